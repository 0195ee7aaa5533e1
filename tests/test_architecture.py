"""The laws of the architecture, read off the syntax trees of the sources.

Every check is a function of one file's path and tree, so each is also run on a snippet that breaks its law: a check
that finds nothing anywhere would be no check.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mcore_rl", "moe", "tools")
TOP_LEVEL = {*PACKAGES, "examples", "tests", "docs"}
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MEGATRON_HOMES = ("mcore_rl/model/", "mcore_rl/parallel/", "mcore_rl/weights/", "moe/record/")
VLLM_HOMES = ("mcore_rl/rollout/vllm/", "mcore_rl/rollout/transfer/", "moe/record/")
LOGPROB = "mcore_rl/functional/logprob.py"  # the one place where logits exist; it reduces over a process group
WITHOUT_PROCESS_GROUPS = (
    "mcore_rl/functional/",
    "mcore_rl/algorithms/",
    "mcore_rl/parallel/layout.py",
    "mcore_rl/weights/plan.py",
)
VIEWS_ONLY = tuple(f"mcore_rl/weights/{name}.py" for name in ("cuts", "families", "plan", "shards"))
# Who may not be imported by whom: a layer knows nothing of those above it (docs/architecture.md).
LAYERS = {
    "mcore_rl/data/": ("model", "weights", "planning", "roles", "rollout", "step", "run", "train", "cli"),
    "mcore_rl/model/": ("planning", "roles", "rollout", "step", "run", "train", "cli"),
    "mcore_rl/rollout/": ("model", "planning", "roles", "step", "run", "train", "cli"),
    "mcore_rl/planning/": ("roles", "step", "run", "train", "cli"),
    "mcore_rl/roles/": ("rollout", "step", "run", "train", "cli"),
    "mcore_rl/step/": ("run", "train", "cli"),
    "mcore_rl/run.py": ("step", "train", "cli"),
}
ABOVE_STEPS = ("mcore_rl/step/", "mcore_rl/train.py", "mcore_rl/cli/")  # may import mcore_rl.step
FILE_LINES, ALGORITHM_LINES, TEST_LINES, FUNCTION_LINES, FOLDER_FILES = 330, 100, 400, 60, 16
ROOT_FILES = {"__init__", "config", "launch", "run", "train", "types"}  # and the package cli

Found = Iterator[str]
Check = Callable[[str, ast.AST], Found]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, however deep; `from a import b` is both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _is_loss(path: str) -> bool:
    """A file that holds losses or what they are made of."""
    home = path.startswith(("mcore_rl/functional/", "mcore_rl/algorithms/"))
    return home and path != LOGPROB and not path.endswith("__init__.py")


# ---------------------------------------------------------------- law 1: who may import what


def law_1_losses_import_torch_only(path: str, tree: ast.AST) -> Found:
    layers = {
        "mcore_rl/functional/": ("mcore_rl.types", "mcore_rl.functional"),
        "mcore_rl/algorithms/": ("mcore_rl.types", "mcore_rl.functional", "mcore_rl.algorithms"),
    }
    for home, own in layers.items():
        if path.startswith(home):
            for line, name in imported(tree):
                standard = name.split(".")[0] in sys.stdlib_module_names
                if not (standard or _within(name, ("torch", *own)) or name == "mcore_rl"):
                    yield f"{path}:{line} imports {name}; {home} imports torch and {', '.join(own)} only"


def law_1_pure_files_never_touch_process_groups(path: str, tree: ast.AST) -> Found:
    if path.startswith(WITHOUT_PROCESS_GROUPS) and path != LOGPROB:
        for line, name in imported(tree):
            if _within(name, ("torch.distributed",)):
                yield f"{path}:{line} imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "distributed":
                yield f"{path}:{node.lineno} uses torch.distributed"


def law_1_megatron_and_vllm_stay_at_home(path: str, tree: ast.AST) -> Found:
    for package, homes in (("megatron", MEGATRON_HOMES), ("vllm", VLLM_HOMES)):
        if not path.startswith(homes):
            for line, name in imported(tree):
                if _within(name, (package,)):
                    yield f"{path}:{line} imports {name}; {package} may be imported in {', '.join(homes)} only"


def law_1_moe_stands_alone(path: str, tree: ast.AST) -> Found:
    forbidden = ("mcore_rl", "tools") if path.startswith("moe/") else ("tools",) if path.startswith("mcore_rl/") else ()
    for line, name in imported(tree):
        if _within(name, forbidden):
            yield f"{path}:{line} imports {name}"


def law_1_layers_know_nothing_above(path: str, tree: ast.AST) -> Found:
    above = [f"mcore_rl.{layer}" for home, layers in LAYERS.items() if path.startswith(home) for layer in layers]
    if path.startswith("mcore_rl/") and not path.startswith(ABOVE_STEPS):
        above.append("mcore_rl.step")
    for line, name in imported(tree):
        if _within(name, tuple(above)):
            yield f"{path}:{line} imports {name}, which is a layer above"


# ---------------------------------------------------------------- law 2: losses are pure


def law_2_losses_are_pure(path: str, tree: ast.AST) -> Found:
    if not _is_loss(path):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _called(node)
            if name in ("item", "tolist", "numpy", "cpu", "print", "getLogger"):
                yield f"{path}:{node.lineno} calls {name}(): a loss is tensors in, tensors out"
            if isinstance(node.func, ast.Attribute) and name.endswith("_") and not name.startswith("_"):
                yield f"{path}:{node.lineno} calls {name}() in place"
            if any(keyword.arg == "out" for keyword in node.keywords):
                yield f"{path}:{node.lineno} writes into out="
        if isinstance(node, ast.AugAssign):
            yield f"{path}:{node.lineno} assigns in place"
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, (ast.Subscript, ast.Attribute)) and not _is_dict_entry(target) for target in targets):
            yield f"{path}:{node.lineno} assigns into something it was given"
        if isinstance(node, ast.arg) and node.arg == "config":
            yield f"{path}:{node.lineno} takes a config object"


def _is_dict_entry(target: ast.expr) -> bool:
    key = target.slice if isinstance(target, ast.Subscript) else None
    return isinstance(key, ast.Constant) and isinstance(key.value, str)


def law_2_losses_never_see_logits(path: str, tree: ast.AST) -> Found:
    if _is_loss(path):
        for node in ast.walk(tree):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
            if isinstance(name, str) and "logits" in name.lower():
                yield f"{path}:{node.lineno} names {name}"


# ---------------------------------------------------------------- law 3: the reduction is data


def law_3_the_reduction_is_data(path: str, tree: ast.AST) -> Found:
    if path.startswith("mcore_rl/algorithms/"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node) in ("mean", "nanmean"):
                yield f"{path}:{node.lineno} takes a mean: over packed or split tokens it is not the global one"
    for node in ast.walk(tree):
        name = getattr(node, "arg", None) or getattr(node, "id", None)
        if name == "loss_agg_mode":
            yield f"{path}:{node.lineno} selects the reduction by name inside the loss"


# ---------------------------------------------------------------- law 4: shards, not mappings


def law_4_shards_are_views(path: str, tree: ast.AST) -> Found:
    if path in VIEWS_ONLY:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node) in ("cat", "stack", "clone", "contiguous", "reshape"):
                yield f"{path}:{node.lineno} calls {_called(node)}(), which copies: a shard is a view of a weight"


# ---------------------------------------------------------------- laws 6 and 7: errors, size, names


def law_6_no_bare_except(path: str, tree: ast.AST) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{path}:{node.lineno} has a bare except"


def law_7_small_functions(path: str, tree: ast.AST) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{path}:{node.lineno} {node.name} has {lines} lines, the budget is {FUNCTION_LINES}"


def law_7_names_say_what_they_are(path: str, tree: ast.AST) -> Found:
    if PurePosixPath(path).stem in ("utils", "util", "helpers", "helper", "misc", "common"):
        yield f"{path}: a file is named after what it holds"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Helper", "Factory", "Utils", "Handler")):
            yield f"{path}:{node.lineno} class {node.name}: a class is named after what it is"


BROKEN: list[tuple[Check, str, str]] = [
    (law_1_losses_import_torch_only, "mcore_rl/functional/x.py", "import numpy"),
    (law_1_losses_import_torch_only, "mcore_rl/functional/x.py", "from mcore_rl.algorithms import base"),
    (law_1_losses_import_torch_only, "mcore_rl/algorithms/x.py", "def f():\n    from mcore_rl.config import RunConfig"),
    (law_1_losses_import_torch_only, "mcore_rl/algorithms/x.py", "from . import base"),
    (law_1_pure_files_never_touch_process_groups, "mcore_rl/weights/plan.py", "import torch.distributed as dist"),
    (law_1_pure_files_never_touch_process_groups, "mcore_rl/weights/plan.py", "from torch import distributed"),
    (law_1_pure_files_never_touch_process_groups, "mcore_rl/parallel/layout.py", "torch.distributed.get_rank()"),
    (law_1_megatron_and_vllm_stay_at_home, "mcore_rl/train.py", "def f():\n    from megatron import core"),
    (law_1_megatron_and_vllm_stay_at_home, "mcore_rl/model/x.py", "import vllm"),
    (law_1_megatron_and_vllm_stay_at_home, "mcore_rl/rollout/engine.py", "import vllm"),
    (law_1_megatron_and_vllm_stay_at_home, "tools/x.py", "importlib.import_module('vllm.config')"),
    (law_1_moe_stands_alone, "moe/stats.py", "from mcore_rl.types import Prompt"),
    (law_1_moe_stands_alone, "mcore_rl/run.py", "import tools.install"),
    (law_1_layers_know_nothing_above, "mcore_rl/data/x.py", "from mcore_rl.model.build import read_hf_config"),
    (law_1_layers_know_nothing_above, "mcore_rl/model/x.py", "from mcore_rl.rollout import engine"),
    (law_1_layers_know_nothing_above, "mcore_rl/rollout/vllm/x.py", "import mcore_rl.planning.plan"),
    (law_1_layers_know_nothing_above, "mcore_rl/planning/check.py", "from mcore_rl.run import open_run"),
    (law_1_layers_know_nothing_above, "mcore_rl/planning/x.py", "from mcore_rl.roles.models import Models"),
    (law_1_layers_know_nothing_above, "mcore_rl/roles/x.py", "def f():\n    from mcore_rl.rollout import engine"),
    (law_1_layers_know_nothing_above, "mcore_rl/roles/x.py", "from mcore_rl.step import scoring"),
    (law_1_layers_know_nothing_above, "mcore_rl/step/x.py", "from mcore_rl.train import train"),
    (law_1_layers_know_nothing_above, "mcore_rl/run.py", "from mcore_rl import step"),
    (law_1_layers_know_nothing_above, "mcore_rl/logs/x.py", "from mcore_rl.step.batches import Metrics"),
    (law_2_losses_are_pure, "mcore_rl/algorithms/x.py", "loss.item()"),
    (law_2_losses_are_pure, "mcore_rl/algorithms/x.py", "ratio.clamp_(0, 1)"),
    (law_2_losses_are_pure, "mcore_rl/functional/x.py", "loss += 1"),
    (law_2_losses_are_pure, "mcore_rl/functional/x.py", "x[mask] = 0"),
    (law_2_losses_are_pure, "mcore_rl/functional/x.py", "torch.exp(x, out=y)"),
    (law_2_losses_are_pure, "mcore_rl/functional/x.py", "def loss(config, x): ..."),
    (law_2_losses_never_see_logits, "mcore_rl/algorithms/x.py", "def loss(logits): ..."),
    (law_2_losses_never_see_logits, "mcore_rl/functional/policy.py", "out.logits"),
    (law_3_the_reduction_is_data, "mcore_rl/algorithms/x.py", "loss = per_token.mean()"),
    (law_3_the_reduction_is_data, "mcore_rl/train.py", "def loss(x, loss_agg_mode='token-mean'): ..."),
    (law_4_shards_are_views, "mcore_rl/weights/shards.py", "qkv = torch.cat([q, k, v])"),
    (law_6_no_bare_except, "mcore_rl/x.py", "try:\n    f()\nexcept:\n    pass"),
    (law_7_small_functions, "mcore_rl/x.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
    (law_7_names_say_what_they_are, "mcore_rl/utils.py", ""),
    (law_7_names_say_what_they_are, "mcore_rl/x.py", "class GroupManager: ..."),
]
CHECKS = list(dict.fromkeys(check for check, _, _ in BROKEN))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_law_holds(check):
    found = []
    for file in SOURCES:
        found += check(file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(), str(file)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("check", "path", "snippet"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_broken_law_is_noticed(check, path, snippet):
    assert list(check(path, ast.parse(snippet)))


def test_every_law_has_a_broken_snippet():
    laws = {value for name, value in globals().items() if name.startswith("law_")}
    assert laws == set(CHECKS)


def line_budget(path: str) -> int:
    if path.startswith("tests/"):
        return TEST_LINES
    return ALGORITHM_LINES if path.startswith("mcore_rl/algorithms/") and not path.endswith("base.py") else FILE_LINES


def test_files_are_short():
    lengths = {f.relative_to(ROOT).as_posix(): len(f.read_text().splitlines()) for f in SOURCES + TESTS}
    assert len(lengths) > 30  # the folders were found
    long = {path: n for path, n in lengths.items() if n > line_budget(path)}
    assert not long, f"more lines than budgeted: {long}"


def test_python_lives_in_the_fixed_folders():
    homes = {p.parent.name for p in ROOT.glob("[!.]*/*.py")}
    assert homes <= TOP_LEVEL, f"new top-level folders with Python: {homes - TOP_LEVEL}"
    assert {p.name for p in ROOT.glob("*.py")} == {"setup.py"}


def test_folders_are_short():
    folders = [f for package in PACKAGES for f in (ROOT / package).rglob("*/") if not f.name.startswith("__")]
    counts = {f.relative_to(ROOT).as_posix(): sum(1 for _ in f.glob("*.py")) for f in folders}
    assert counts["mcore_rl/step"] > 5
    assert not {folder: n for folder, n in counts.items() if n > FOLDER_FILES + 1}  # __init__.py is no file to read
    assert {f.stem for f in (ROOT / "mcore_rl").glob("*.py")} == ROOT_FILES


# ------------------------------------------------------------------------------------------------------------- circles


def modules_of(root: Path) -> dict[str, ast.AST]:
    """Dotted name -> syntax tree of every module of the packages that are installed."""
    files = sorted(p for package in ("mcore_rl", "moe") for p in (root / package).rglob("*.py"))
    names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in files]
    return {name: ast.parse(p.read_text(), str(p)) for name, p in zip(names, files)}


def needed_by(modules: dict[str, ast.AST]) -> dict[str, set[str]]:
    """The modules that each one imports, also within functions; not what is there for type checkers alone."""
    found = {}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        names = {other for _, other in imported(tree)}
        known = {other for other in names if other in modules}
        # `from a import b` needs a only where b is no module
        packages = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
                    and all(f"{n.module}.{alias.name}" in modules for alias in n.names)}  # fmt: skip
        found[name] = known - packages - {name}
    return found


def circle(needs: dict[str, set[str]]) -> list[str]:
    """Names that need each other in a circle, the first also last; empty where there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(needs.get(name, ())):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(needs) if (found := search(name, []))), [])


def by_folder(needs: dict[str, set[str]], packages: set[str]) -> dict[str, set[str]]:
    """The same between folders; a file in the root of mcore_rl or moe stands for itself."""

    def folder(name: str) -> str:
        above = name if name in packages else name.rpartition(".")[0]
        return name if above in ("mcore_rl", "moe") else above

    found: dict[str, set[str]] = {}
    for name, others in needs.items():
        found.setdefault(folder(name), set()).update(map(folder, others))
    return {name: others - {name} for name, others in found.items()}


def test_no_circles_between_files_nor_folders():
    modules = modules_of(ROOT)
    needs = needed_by(modules)
    assert "mcore_rl.step.updating" in needs["mcore_rl.train"]
    assert not circle(needs)
    packages = {name for name in modules if (ROOT / name.replace(".", "/")).is_dir()}
    assert not circle(by_folder(needs, packages))


def test_a_circle_is_noticed():
    sources = {"mcore_rl.a.x": "from mcore_rl.b import y", "mcore_rl.b.y": "def f():\n    from mcore_rl.a.z import g",
               "mcore_rl.a.z": "", "mcore_rl.a": "", "mcore_rl.b": ""}  # fmt: skip
    needs = needed_by({name: ast.parse(source) for name, source in sources.items()})
    assert not circle(needs), "no file needs itself"
    assert circle(by_folder(needs, {"mcore_rl.a", "mcore_rl.b"})) == ["mcore_rl.a", "mcore_rl.b", "mcore_rl.a"]
    needs["mcore_rl.a.z"] = {"mcore_rl.a.x"}
    assert circle(needs)[0] == circle(needs)[-1] and len(circle(needs)) == 4
