"""Make the virtual environment of the CPU profile: run by the Makefile with any Python 3, standard library only.

The environment is complete when it holds a stamp with the digest of everything it was made from; the stamp is written
last, so an interrupted install is noticed and made anew, and a finished one is left alone until a pin changes.

    python3 tools/install.py .venv
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
INPUTS = (LOCK, ROOT / "setup.py", Path(__file__).resolve())
STAMP = "mcore-rl-installed"  # digest of INPUTS and of the checkout's place, written last
MARK = "mcore-rl-environment"  # written first: this folder is ours to make anew
SUPPORTED = ((3, 11), (3, 12))
BUILD_TOOLS = ("packaging==", "setuptools==", "wheel==")

NO_PYTHON = """\
no Python 3.11 or 3.12 with the venv module was found (looked for: {looked}).
Install one (Debian: apt-get install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python3.11"""
NO_TORCH = """\
pip finds no {torch} for Python {version}.
The package index carries only the CUDA build of PyTorch; the CPU wheels are on PyTorch's own CPU wheel index. Set
PIP_EXTRA_INDEX_URL to the address of that index (the one PyTorch's "Get started" page shows for Linux, Pip, CPU), or
PIP_FIND_LINKS to a folder that holds the wheel, and run make again."""
FOREIGN = """\
{venv} exists and was not made by this installer, so it is left alone.
Remove it, or install elsewhere: make VENV=/path/to/venv"""


class InstallError(Exception):
    """What went wrong and what the user can do."""


def install(venv: Path, python: str | None) -> None:
    """Make `venv` complete; returns at once if it is."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits and finds the work done
        stamp = venv / STAMP
        if stamp.exists() and stamp.read_text() == digest(venv):
            return
        start = time.monotonic()
        if not stamp.exists():
            make_venv(venv, find_python(python))
        stamp.unlink(missing_ok=True)
        if python_version(venv_python(venv)) not in SUPPORTED:
            raise InstallError(f"the Python of {venv} no longer works; remove it and run make again")
        install_packages(venv)
        stamp.write_text(digest(venv))
        print(f"installed in {time.monotonic() - start:.0f} s: {venv}", flush=True)


def digest(venv: Path) -> str:
    content = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS))
    content.update(str(ROOT).encode())  # the editable install points here: a moved checkout is installed anew
    return content.hexdigest()


def venv_python(venv: Path) -> str:
    return str(venv / "bin" / "python")


def python_version(python: str) -> tuple[int, int] | None:
    """(major, minor) of an interpreter that can make environments; None if it does not run or cannot."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return tuple(int(part) for part in done.stdout.split()) if done.returncode == 0 else None


def find_python(wanted: str | None) -> str:
    candidates = [wanted] if wanted else ["python3.11", "python3", "python3.12", sys.executable]
    for candidate in candidates:
        if python_version(candidate) in SUPPORTED:
            return candidate
    raise InstallError(NO_PYTHON.format(looked=", ".join(candidates)))


def make_venv(venv: Path, python: str) -> None:
    if venv.exists() and not (venv / MARK).exists():
        raise InstallError(FOREIGN.format(venv=venv))
    print(f"making {venv} with {python}", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir()
    (venv / MARK).touch()
    run([python, "-m", "venv", str(venv)], venv)


def install_packages(venv: Path) -> None:
    pins = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    tools = [pin for pin in pins if pin.startswith(BUILD_TOOLS)]
    step("1/4 build tools", venv, "--no-deps", *tools)
    try:
        step(f"2/4 {torch}", venv, "--no-deps", torch)
    except InstallError as error:
        if "No matching distribution found for torch" not in str(error):
            raise
        version = "{}.{}".format(*python_version(venv_python(venv)))
        raise InstallError(NO_TORCH.format(torch=torch, version=version)) from error
    step(f"3/4 {len(pins)} pinned packages", venv, "--no-deps", "--no-build-isolation", "-r", str(LOCK))
    step("4/4 mcore-rl", venv, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def step(title: str, venv: Path, *arguments: str) -> None:
    print(title, flush=True)
    pip = [venv_python(venv), "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]
    run([*pip, *arguments], venv)


def run(command: list[str], venv: Path) -> None:
    """Run a command with its output in `venv`/install.log. Raises InstallError with the end of that output."""
    log = venv / "install.log"
    with log.open("a") as out:
        begin = out.tell()
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        tail = "\n".join(log.read_bytes()[begin:].decode(errors="replace").splitlines()[-20:])
        raise InstallError(f"this command failed with exit code {done.returncode}:\n  {' '.join(command)}\n{tail}")


if __name__ == "__main__":
    try:
        install(Path(os.path.abspath(sys.argv[1])), os.environ.get("PYTHON") or None)
    except InstallError as error:
        sys.exit(f"install: {error}")
    except KeyboardInterrupt:
        sys.exit("install: interrupted; the next make begins again")
