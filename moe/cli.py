"""moe-stability: what expert routing does to importance ratios, and what that allows to be said.

Every command writes its numbers (JSON, CSV), plots, report.html, verdicts.json and ledger.md into --out. Exit codes: 0
ok, 1 a theorem is broken or a training run is unstable, 2 a mistake of usage. How to read it: docs/moe_stability.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moe.judge.verdict import Standing, Verdict, exit_code
from moe.judge.watch import Level, first_of_each, judge_run
from moe.measure.sweep import ALPHAS
from moe.show.report import rows_of, write_report
from moe.studies.commands import (
    compare_study,
    exact_study,
    objectives_study,
    record_study,
    sweep_study,
    watch_study,
)
from moe.studies.engine import Engine, mismatch_study
from moe.studies.setting import Asked, Say, open_setting
from moe.studies.study import Study

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@dataclass
class Bridges:
    """What this package cannot do alone, given by whoever starts it.

    Attributes:
        engine: opens a rollout engine for `mismatch`.
        as_hf: turns a path that is no HF folder into one, or raises ValueError with what to do.
    """

    engine: Engine | None = None
    as_hf: Callable[[Path], Path] | None = None


bridges = Bridges()

Old = Annotated[Path, typer.Argument(help="HF folder of the policy that gave the answers, or runs/NAME")]
New = Annotated[Path, typer.Argument(help="HF folder of the policy after a step")]
Prompts = Annotated[Path | None, typer.Option(help="JSONL: prompt and, for rewards, answer")]
Rollouts = Annotated[Path | None, typer.Option(help="JSONL: prompt, response and, for rewards, reward")]
Limit = Annotated[int, typer.Option(min=2, help="prompts taken from the file")]
Answers = Annotated[int, typer.Option(min=1, help="sampled for each prompt")]
MaxTokens = Annotated[int, typer.Option(min=1, help="of a sampled answer")]
Seed = Annotated[int, typer.Option(min=0)]
Draws = Annotated[int, typer.Option(min=10, help="of the bootstrap")]
Dtype = Annotated[str, typer.Option(help="float64, float32 or bfloat16")]
Out = Annotated[Path, typer.Option(help="folder of this replicate; commands add to it")]
GradPrompts = Annotated[int, typer.Option(min=2, help="prompts whose answers gradients are taken of")]
Parameters = Annotated[str, typer.Option(help="regular expression: parameters that are differentiated; default all")]
OUT = Path("moe-stability")


def _say() -> Say:
    started = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr, flush=True)


def _asked(prompts, rollouts, limit, answers, max_tokens, seed, draws, dtype) -> Asked:
    allowed = ("float64", "float32", "bfloat16")
    if dtype not in allowed:
        raise ValueError(f"--dtype {dtype!r}: allowed are {', '.join(allowed)}")
    return Asked(_command(), prompts, rollouts, limit, answers, max_tokens, seed, draws, dtype, _say())


def _command() -> str:
    return shlex.join(["moe-stability", *sys.argv[1:]])


def hf_folder(path: Path) -> Path:
    """A HF folder as it is; the exported policy of a training run; else what the bridge makes of it."""
    for candidate in (path, path / "hf"):
        weights = [*candidate.glob("*.safetensors"), *candidate.glob("*.bin")]
        if (candidate / "config.json").is_file() and weights:
            return candidate
    if bridges.as_hf is not None and path.exists():
        return bridges.as_hf(path)
    raise ValueError(f"{str(path)!r} is no Hugging Face folder (config.json, weights) and no run that exported one")


def _finish(studies: list[Study], out: Path) -> None:
    for study in studies:
        study.save(out)
    _tell(*write_report([out], out))


def _tell(path: Path, verdicts: list[Verdict]) -> None:
    counts = {standing: sum(v.standing is standing for v in verdicts) for standing in Standing}
    for v in verdicts:
        if v.standing is not Standing.NOT_SHOWN:
            print(f"{v.standing:>16}  {v.claim.text}")
    print(", ".join(f"{standing}: {count}" for standing, count in counts.items()))
    print(path)
    raise typer.Exit(exit_code(verdicts))


@app.command()
def compare(
    old: Old,
    new: Annotated[list[Path], typer.Argument(help="one HF folder, or several after each other by age")],
    prompts: Prompts = None,
    rollouts: Rollouts = None,
    dense: Annotated[tuple[Path, Path] | None, typer.Option(help="OLD NEW of a dense control")] = None,
    sweep: Annotated[bool, typer.Option(help="also the step at many sizes")] = True,
    objectives: Annotated[bool, typer.Option(help="also gradients of every objective, where there are rewards")] = True,
    grad_prompts: GradPrompts = 24,
    parameters: Parameters = "",
    limit: Limit = 96,
    answers: Answers = 8,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    draws: Draws = 1000,
    dtype: Dtype = "float64",
    out: Out = OUT,
) -> None:
    """Two policies on the same answers: the whole argument, from flips to the price of averaging."""
    asked = _asked(prompts, rollouts, limit, answers, max_tokens, seed, draws, dtype)
    paths = [hf_folder(path) for path in new]
    control = None if dense is None else (hf_folder(dense[0]), hf_folder(dense[1]))
    setting = open_setting(asked, hf_folder(old))
    studies = [compare_study(setting, paths, control), exact_study("moe-stability bench-exact")]
    if sweep:
        studies.append(sweep_study(setting, paths[0]))
    rewarded = setting.probe.rewards is not None and setting.probe.rewards.unique().numel() > 1
    if objectives and rewarded:
        studies.append(objectives_study(setting, paths[0], grad_prompts, parameters))
    elif objectives:
        asked.say("no objectives: no rewards, or all are equal")
    _finish(studies, out)


@app.command()
def sweep(
    old: Old,
    new: New,
    prompts: Prompts = None,
    rollouts: Rollouts = None,
    alphas: Annotated[str, typer.Option(help="sizes of the step, comma separated")] = "",
    limit: Limit = 96,
    answers: Answers = 8,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    draws: Draws = 1000,
    dtype: Dtype = "float64",
    out: Out = OUT,
) -> None:
    """The step from OLD to NEW at many sizes: slopes of the variances and of flips, and where chi passes 1."""
    sizes = _alphas(alphas)
    asked = _asked(prompts, rollouts, limit, answers, max_tokens, seed, draws, dtype)
    _finish([sweep_study(open_setting(asked, hf_folder(old)), hf_folder(new), sizes)], out)


def _alphas(text: str) -> tuple[float, ...]:
    if not text:
        return ALPHAS
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) < 3 or min(sizes) <= 0:
        raise ValueError(f"--alphas {text!r}: three or more positive numbers are needed, such as 1,0.1,0.01")
    return sizes


@app.command()
def objectives(
    old: Old,
    new: New,
    prompts: Prompts = None,
    rollouts: Rollouts = None,
    grad_prompts: GradPrompts = 24,
    parameters: Parameters = "",
    limit: Limit = 96,
    answers: Answers = 8,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    draws: Draws = 1000,
    dtype: Dtype = "float64",
    out: Out = OUT,
) -> None:
    """One batch under every objective: what counts, noise of the router in the gradient, bias, cosine."""
    asked = _asked(prompts, rollouts, min(limit, grad_prompts), answers, max_tokens, seed, draws, dtype)
    _finish([objectives_study(open_setting(asked, hf_folder(old)), hf_folder(new), grad_prompts, parameters)], out)


@app.command()
def mismatch(
    model: Annotated[Path, typer.Argument(help="HF folder, or runs/NAME")],
    prompts: Prompts = None,
    engine_dtypes: Annotated[str, typer.Option(help="of the engine, comma separated")] = "float32,bfloat16",
    limit: Limit = 96,
    answers: Answers = 8,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    draws: Draws = 1000,
    dtype: Dtype = "float32",
    out: Out = OUT,
) -> None:
    """Trainer (transformers, --dtype) against the rollout engine at equal weights, on own routes and the engine's."""
    if bridges.engine is None:
        raise ValueError("no rollout engine is at hand; start this as moe-stability, which brings vLLM")
    asked = _asked(prompts, None, limit, answers, max_tokens, seed, draws, dtype)
    _finish([mismatch_study(asked, hf_folder(model), bridges.engine, engine_dtypes.split(","))], out)


@app.command()
def record(
    model: Annotated[Path, typer.Argument(help="HF folder, or runs/NAME")],
    prompts: Prompts = None,
    rollouts: Rollouts = None,
    limit: Limit = 96,
    answers: Answers = 8,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    dtype: Dtype = "float64",
    out: Out = OUT,
) -> None:
    """Answers with their log-probs and routes on disk; OUT/rollouts.jsonl is a file for --rollouts."""
    asked = _asked(prompts, rollouts, limit, answers, max_tokens, seed, 1000, dtype)
    study = record_study(asked, hf_folder(model), out)
    study.save(out)
    size = study.estimates["record/bytes_per_token"].value
    print(f"{out}: {study.facts['answers']} answers, routes of {size:.0f} bytes a token")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="folder of a training run, running or done")],
    follow: Annotated[float, typer.Option(min=0, help="seconds between looks; 0: one look")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="folder for report.html; default RUN/moe-stability")] = None,
) -> None:
    """The verdict on a training run: ok, watch or unstable, the reason, and the knob to turn. Exit code 1: unstable."""
    while True:
        study = watch_study(_command(), run)
        level, alarms = judge_run(rows_of(study.series))
        print(f"{run}: {level} after step {study.facts['steps']}")
        for alarm in first_of_each(alarms):
            print(f"  {alarm}")
        folder = out or (run if run.is_dir() else run.parent) / "moe-stability"
        study.save(folder)
        path, _ = write_report([folder], folder)
        if not follow:
            print(path)
            raise typer.Exit(int(level is Level.UNSTABLE))
        sys.stdout.flush()
        time.sleep(follow)


@app.command(name="bench-exact")
def bench_exact(out: Out = OUT) -> None:
    """The bias of every objective without sampling: policies so small that all answers can be enumerated."""
    study = exact_study(_command())
    names = ("no ratio", "token", "SAPO", "GSPO", "prefix", "product", "token clip")
    print("  sd(z)  " + "".join(f"{name:>12}" for name in names))
    for alpha in sorted({name.split("/")[1] for name in study.estimates}, key=float):
        values = [study.estimates[f"exact/{alpha}/{name}/bias"].value for name in names]
        spread = study.estimates[f"exact/{alpha}/spread"].value
        print(f"{spread:7.3f}  " + "".join(f"{value:12.3g}" for value in values))
    _finish([study], out)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="what --out of the commands was; one a seed")],
    out: Out = OUT,
) -> None:
    """One report of several replicates: claims that must not hang on one seed are judged here."""
    _tell(*write_report(folders, out))


def main(given: Bridges | None = None) -> None:
    """Entry point; a mistake of usage is told in one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if given is not None:
        bridges.engine, bridges.as_hf = given.engine, given.as_hf
    try:
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
