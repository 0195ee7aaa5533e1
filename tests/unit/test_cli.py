"""The command line: what it offers, and that help and a configuration's mistakes come before the long imports."""

import re
import subprocess
import sys

import pytest

from mcore_rl import cli

COMMANDS = ("train", "plan", "lint", "generate", "pairs", "evaluate", "convert", "verify")
HEAVY = ("torch", "transformers", "megatron", "vllm")
SCRIPT = f"""
import sys
from mcore_rl.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print("imported", [name for name in {HEAVY} if name in sys.modules])
    raise
"""


def test_the_list_of_commands_is_complete():
    groups = [info.typer_instance for info in cli.app.registered_groups]
    assert tuple(c.callback.__name__ for group in groups for c in group.registered_commands) == COMMANDS
    assert tuple(re.findall(r"\w+", cli.__doc__.removeprefix("mcore-rl:"))) == COMMANDS


def asked(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_is_quick():
    code, out, _ = asked("--help")
    assert code == 0 and "Usage: " in out and out.endswith("imported []\n")


@pytest.mark.parametrize("command", ["train", "plan", "lint", "pairs", "evaluate"])
def test_a_mistake_of_the_configuration_is_told_at_once(tmp_path, command):
    (tmp_path / "run.yaml").write_text("name: run\nmodel: {path: .}\n")
    code, out, err = asked(command, str(tmp_path / "run.yaml"), "rollout.group_sise=4")
    assert code == 2 and "did you mean 'rollout.group_size'?" in err and out.endswith("imported []\n")
