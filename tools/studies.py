"""Train the demo's policy many times, an arm at a time with several seeds, and tabulate what came out.

python -m tools.studies run algorithms runs/studies --seeds 0 1 2       # hours on two cores; goes on where it stopped
python -m tools.studies table algorithms runs/studies                   # Markdown
python -m tools.studies against-first fall runs/studies                 # of rewards: each arm against the first

Every arm of a seed starts from the same warm start, `runs/studies/seedN/sft`, and lies beside it. The trainer is one
rank, the rollout engine a child of it, so that the trainer's peak memory is its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.study_tables import (
    BY_LENGTH,
    COST,
    CUT_OFF,
    DISCRIMINATOR,
    ENDED_ITSELF,
    FALL,
    LEARNING,
    LENGTHS,
    ROUTING,
    against_first,
    is_done,
    table,
)

DEMO = Path("examples/demo")
STEPS = 60  # half of the demo's, so that three seeds of a study take an afternoon on one core
OWN_STEPS = ("dpo.yaml", "gapo.yaml")  # as many as they say
BESIDE = ("parallel.ep=1", "rollout.placement=child", "logging.tensorboard=false")

MIXED = ("data.params.n=20", "data.params.min_n=6", "rollout.max_response_tokens=23")
CUT = (*MIXED, "rollout.max_response_tokens=16")  # nearly half of the prompts have answers that do not fit

FAST = ("steps=20", "optimizer.lr=4e-4", "optimizer.schedule=constant", "evaluate.every=20", "checkpoint.every=0")
WATCHED = ("moe.log_every=1",)

CONSTRAINTS = (  # GAPO's task and batches, for the others: there the rule checker is the reward
    "data.task=digit_constraints",
    *(f"data.params.{x}" for x in ("min_length=4", "max_length=4", "min_forbidden=2", "max_forbidden=6")),
    "data.params.order=false",
    "data.params.required=false",
    "rollout.max_response_tokens=6",
)


@dataclass(frozen=True)
class Arm:
    """A configuration of examples/demo, what is changed in it, and the warm start it begins at."""

    config: str
    changes: tuple[str, ...] = ()
    warm_start: str = "sft"


ARMS: dict[str, Arm] = {
    **{name: Arm(f"{name}.yaml") for name in ("ppo", "dpo", "grpo", "dapo", "gspo", "sapo", "cispo")},
    "grpo_clip_higher": Arm("grpo.yaml", ("algorithm.clip_high=0.28",)),
    "grpo_no_clip": Arm("grpo.yaml", ("algorithm.clip_low=0.99", "algorithm.clip_high=1000")),
    **{
        f"grpo_g{size}": Arm("grpo.yaml", (f"rollout.group_size={size}", f"batch.prompts_per_step={256 // size}"))
        for size in (2, 4, 16)
    },
    **{
        f"{name}_lr{lr}": Arm(f"{config}.yaml", (f"optimizer.lr={lr}", *changes), warm_start)
        for name, config, changes, warm_start in (
            *((name, name, ("moe.log_every=5",), "sft") for name in ("grpo", "dapo", "gspo", "sapo")),
            ("grpo_r2", "grpo", ("moe.log_every=5", "moe.routing_replay=old"), "sft"),
            ("grpo_r3", "grpo", ("moe.log_every=5", "moe.routing_replay=rollout"), "sft"),
            ("grpo_dense", "grpo", (), "sft_dense"),
        )
        for lr in ("1e-4", "2e-4", "4e-4")
    },
    **{  # twice the learning rate at once: who loses the policy in the first rollouts, seen at every one of them
        f"fall_{name}": Arm(f"{config}.yaml", (*FAST, *changes), warm_start)
        for name, config, changes, warm_start in (
            *((name, name, WATCHED, "sft") for name in ("grpo", "dapo", "gspo", "sapo")),
            ("grpo_r2", "grpo", (*WATCHED, "moe.routing_replay=old"), "sft"),
            ("grpo_frozen", "grpo", (*WATCHED, "model.freeze_router=true"), "sft"),
            ("sapo_r2", "sapo", (*WATCHED, "moe.routing_replay=old"), "sft"),
            ("grpo_dense", "grpo", (), "sft_dense"),
            ("sapo_dense", "sapo", (), "sft_dense"),
        )
    },
    **{
        f"mixed_{aggregation}": Arm("grpo.yaml", (f"algorithm.aggregation={aggregation}", *MIXED), "sft_mixed")
        for aggregation in ("sequence_mean", "token_mean")
    },
    **{
        f"cut_{name}": Arm("dapo.yaml", (*CUT, *changes), "sft_mixed")
        for name, changes in (
            ("counted", ()),
            ("filtered", ("algorithm.overlong_filter=true",)),
            ("punished", ("algorithm.overlong_max_length=16", "algorithm.overlong_cache=4")),
        )
    },
    **{
        f"constraints_{name}": Arm(f"{name}.yaml", (*CONSTRAINTS, "steps=20", "batch.mini_batches=4"), "gapo_sft")
        for name in ("ppo", "grpo", "dapo", "gspo", "sapo")
    },
    # its pairs have no answer to compare with
    "constraints_dpo": Arm("dpo.yaml", ("evaluate.sample=false",), "gapo_sft"),
    "constraints_gapo": Arm("gapo.yaml", (), "gapo_sft"),
}
WARM_STARTS = {  # size of the demo's model, the configuration of its SFT and what is changed in it
    "sft": ("0.9m", "sft.yaml", ()),
    "sft_mixed": ("0.9m", "sft.yaml", MIXED),
    "sft_dense": ("dense", "sft.yaml", ()),
    "gapo_sft": ("0.9m", "gapo_sft.yaml", ()),
}
PAIRS = {"sft": (), "gapo_sft": CONSTRAINTS}  # what is changed in the run that pairs are drawn for, by warm start

STUDIES: dict[str, tuple[str, ...]] = {
    "algorithms": ("ppo", "dpo", "grpo", "dapo", "gspo", "sapo", "cispo"),
    "clip_higher": ("grpo", "grpo_clip_higher", "grpo_no_clip", "dapo"),
    "group_size": ("grpo_g2", "grpo_g4", "grpo", "grpo_g16"),
    "learning_rate": tuple(name for name in ARMS if "_lr" in name),
    "fall": tuple(name for name in ARMS if name.startswith("fall_")),
    "token_loss": ("mixed_sequence_mean", "mixed_token_mean"),
    "overlong": ("cut_counted", "cut_filtered", "cut_punished"),
    "constraints": tuple(f"constraints_{name}" for name in ("ppo", "dpo", "grpo", "gapo", "dapo", "gspo", "sapo")),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table", "cost", "against-first"))
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="of the study only these, in this order")
    args = parser.parse_args(argv)
    arms = args.arms or STUDIES[args.study]
    if args.verb == "run":
        for seed in args.seeds:
            for arm in arms:
                run_arm(args.folder, seed, arm)
    elif args.verb == "against-first":
        print(against_first(args.folder, arms, args.seeds))
    else:
        more = {
            "token_loss": BY_LENGTH,
            "overlong": (*BY_LENGTH, *CUT_OFF),
            "learning_rate": ROUTING,
            "constraints": DISCRIMINATOR,
        }
        learning = FALL if args.study == "fall" else LEARNING + more.get(args.study, ())
        print(table(args.folder, arms, args.seeds, COST if args.verb == "cost" else learning))


def run_arm(folder: Path, seed: int, name: str) -> None:
    """Train one arm with one seed, after the warm start it needs; what is finished is left alone."""
    home, arm = folder / f"seed{seed}", ARMS[name]
    warm_start(home, seed, arm.warm_start)
    changes = arm.changes if arm.config in OWN_STEPS else (f"steps={STEPS}", *arm.changes)
    if arm.config == "dpo.yaml":
        pairs = make_pairs(home, seed, arm.warm_start)
        changes += tuple(f"data.{split}_file={pairs}/{split}.jsonl" for split in ("train", "eval"))
    train(home, name, seed, arm.config, f"model.path={home}/{arm.warm_start}/hf", *changes)
    if arm.warm_start == "sft_mixed":
        for n in LENGTHS:
            one_length = (f"data.params.n={n}", f"data.params.min_n={n}")
            ask(home, seed, name, str(n), arm.config, f"{home}/{name}/hf", *arm.changes, *one_length)
    if name == "constraints_dpo":
        for when, trained in (("before", arm.warm_start), ("after", name)):
            ask(home, seed, name, when, "grpo.yaml", f"{home}/{trained}/hf", *CONSTRAINTS)


def warm_start(home: Path, seed: int, name: str) -> None:
    size, config, changes = WARM_STARTS[name]
    model = home / f"model_{size}"
    if not (model / "config.json").exists():
        call(sys.executable, "-m", "tools.make_demo_model", str(model), "--seed", str(seed), "--size", size)
    train(home, name, seed, config, f"model.path={model}", *changes)


def ask(home: Path, seed: int, name: str, what: str, config: str, policy: str, *changes: str) -> None:
    """Held-out prompts of a configuration with `changes`, asked of a policy; accuracy_WHAT.json in the run's folder."""
    path = home / name / f"accuracy_{what}.json"
    if not path.exists():
        overrides = (f"seed={seed}", f"model.path={policy}", "parallel.ep=1", *changes)
        command = ("evaluate", str(DEMO / config), *overrides, "--model", policy)
        path.write_text(call(beside_python("mcore-rl"), *command))


def make_pairs(home: Path, seed: int, start: str) -> Path:
    """The folder of a warm start's pairs, made of its own scored answers."""
    folder = home / f"pairs_{start}"
    if not (folder / "eval.jsonl").exists():  # written last
        overrides = (f"seed={seed}", f"model.path={home}/{start}/hf", "parallel.ep=1", *PAIRS[start])
        command = ("pairs", str(DEMO / "grpo.yaml"), *overrides, "--out", str(folder), "--prompts", "1024")
        call(beside_python("mcore-rl"), *command)
    return folder


def train(home: Path, name: str, seed: int, config: str, *overrides: str) -> None:
    """A run of `mcore-rl train`, or the rest of one that was stopped."""
    run_dir = home / name
    if is_done(run_dir):
        return
    resume = ["resume=true"] if (run_dir / "metrics.jsonl").exists() else []
    place = (f"name={name}", f"output_dir={home}", f"seed={seed}")
    try:
        call(beside_python("mcore-rl"), "train", str(DEMO / config), *place, *BESIDE, *overrides, *resume)
    except subprocess.CalledProcessError:
        if not (run_dir / "metrics.jsonl").exists():  # it did not even start
            raise
        (run_dir / ENDED_ITSELF).touch()  # as DAPO does where no group is left that it could learn from


def beside_python(command: str) -> str:
    """The console script of this interpreter's environment."""
    return str(Path(sys.executable).parent / command)


def call(*command: str) -> str:
    """Run a command and return what it printed. Raises CalledProcessError where it failed."""
    print(*command, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    main()
