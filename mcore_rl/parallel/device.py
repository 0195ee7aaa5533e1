"""Megatron-Core on a host without CUDA, by the same code path as on a GPU.

Megatron names CUDA in its source (`torch.cuda.current_device()`, `device="cuda"`, `x.cuda()`). On a host without CUDA
an import hook compiles `megatron.*` from a rewritten syntax tree, so that those names mean the CPU: torch itself stays
untouched, other libraries of the process see a plain torch, and nothing is paid at run time. The few places where the
logic, not a name, needs CUDA or a missing package are functions in `megatron_patches`. With CUDA and TransformerEngine
`install()` does nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import marshal
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType

import torch

from mcore_rl.parallel import megatron_patches

MEGATRON_VERSION = "0.16.1"  # the release the rewrite rules and the patches were read from
STAND_IN = "mcore_rl.parallel.cpu_cuda"

Rule = Callable[[ast.AST], ast.AST]


def torch_cuda(node: ast.AST) -> ast.AST:
    """`torch.cuda` -> the stand-in module. mappings.py:91, router.py:90, parallel_state.py:198."""
    if isinstance(node, ast.Attribute) and node.attr == "cuda" and isinstance(node.value, ast.Name):
        return ast.Name("__cpu_cuda__", node.ctx) if node.value.id == "torch" else node
    return node


def cuda_device(node: ast.AST) -> ast.AST:
    """`"cuda"` -> `"cpu"`, as a device or an autocast type. schedules.py:596, optimizer.py:473, clip_grads.py:90."""
    return ast.Constant("cpu") if isinstance(node, ast.Constant) and node.value == "cuda" else node


def tensor_type(node: ast.AST) -> ast.AST:
    """`"torch.cuda.FloatTensor"` -> `"torch.FloatTensor"`. optimizer.py:671, distrib_optimizer.py:361."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in _TENSOR_TYPES:
        return ast.Constant(node.value.replace(".cuda", ""))
    return node


def cuda_method(node: ast.AST) -> ast.AST:
    """`x.cuda(...)` -> `x`. rope_utils.py:64, tensor_parallel/data.py:84, language_module.py:244."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
        return node.func.value
    return node


def pinned_memory(node: ast.AST) -> ast.AST:
    """`pin_memory=True` -> `False`: the pinned allocator belongs to an accelerator. rope_utils.py:63, utils.py:898."""
    if isinstance(node, ast.keyword) and node.arg == "pin_memory" and isinstance(node.value, ast.Constant):
        node.value = ast.Constant(False)
    return node


_OWN_SOURCE = zlib.crc32(Path(__file__).read_bytes())
_TENSOR_TYPES = {f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}
REWRITE_RULES: tuple[Rule, ...] = (torch_cuda, cuda_device, tensor_type, cuda_method, pinned_memory)


def install() -> bool:
    """Prepare the import of Megatron-Core for this host; call before anything imports `megatron`. Idempotent.

    Returns:
        True where the CPU backend is active, False with CUDA.
    Raises:
        RuntimeError: megatron was imported before, or megatron-core is not the release this was written for.
    """
    cpu = not torch.cuda.is_available()
    patches = megatron_patches.WITHOUT_CUDA if cpu else ()
    if not has_transformer_engine():
        patches += megatron_patches.WITHOUT_TRANSFORMER_ENGINE
    _quiet_known_notices()
    if not patches or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return cpu
    _check_version()
    if early := sorted(name for name in sys.modules if name.startswith("megatron.core")):
        raise RuntimeError(
            f"{early[0]} was imported before mcore_rl.parallel, so it can no longer be adapted to a host without CUDA "
            "or TransformerEngine; import mcore_rl.parallel before anything that imports megatron"
        )
    sys.meta_path.insert(0, _Finder(REWRITE_RULES if cpu else (), patches))
    return cpu


def has_transformer_engine() -> bool:
    """Whether NVIDIA TransformerEngine can be imported; it needs CUDA."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def _check_version() -> None:
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return  # the import of megatron says so itself
    if version != MEGATRON_VERSION:
        raise RuntimeError(
            f"megatron-core {version} is installed, but its adaptation to hosts without CUDA or TransformerEngine was "
            f"written for {MEGATRON_VERSION}; pip install megatron-core=={MEGATRON_VERSION}"
        )


def _quiet_known_notices() -> None:
    """Megatron warns about optional packages that a CPU host never has, and at every start about its own use of torch's
    old names and about a feature (rerunning steps) that is off; nothing else is silenced.
    """
    warnings.filterwarnings(
        "ignore", "(Transformer Engine and )?Apex (is|are) not installed", module=r"megatron\.core\."
    )
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # There is one generator on a CPU host, so the "GPU" context does move the CPU state (random.py:229).
        rng = logging.getLogger("megatron.core.tensor_parallel.random")
        rng.addFilter(_not_rng_notice)


def _not_rng_notice(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


class _Rewriter(ast.NodeTransformer):
    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        for rule in self.rules:
            replaced = rule(node)
            node = replaced if replaced is node else ast.copy_location(replaced, node)
        return node


class MegatronLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module of Megatron from its rewritten tree and applies the patches meant for it after its body ran.

    Parsing, rewriting and compiling cost a second and more of every process, so the result is kept in `__pycache__`.
    """

    def __init__(self, name: str, path: str, rules: Sequence[Rule], patches: Sequence[megatron_patches.Patch]) -> None:
        super().__init__(name, path)
        self.rules, self.patches = rules, patches

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if not self.rules or b"cuda" not in source and b"pin_memory" not in source:
            return super().get_code(fullname)
        # The usual .pyc file belongs to the unchanged source, so the rewritten module is cached beside it.
        cached = importlib.util.cache_from_source(path, optimization=self._tag())
        digest = hashlib.sha256(source).digest()
        if os.path.exists(cached):
            stored = self.get_data(cached)
            if stored.startswith(digest):
                return marshal.loads(stored[len(digest) :])
        tree = ast.fix_missing_locations(_Rewriter(self.rules).visit(ast.parse(source, path)))
        code = compile(tree, path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(cached, digest + marshal.dumps(code))  # whole or not at all; nothing where it may not write
        return code

    def _tag(self) -> str:
        """Names the rules and this module's version of them in the name of a cache file."""
        names = ",".join(rule.__name__ for rule in self.rules)
        return f"cpu{zlib.crc32(names.encode(), _OWN_SOURCE):08x}"

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__cpu_cuda__"] = importlib.import_module(STAND_IN)
        super().exec_module(module)
        for patch in self.patches:
            if patch.module == module.__name__:
                patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, rules: Sequence[Rule], patches: Sequence[megatron_patches.Patch]) -> None:
        self.rules, self.patches = rules, patches

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None):
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = MegatronLoader(spec.loader.name, spec.loader.path, self.rules, self.patches)
        return spec
