"""mcore-rl: train, plan, lint, generate, pairs, evaluate, convert, verify."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcore_rl.cli import weights as commands
from mcore_rl.config import ParallelConfig, RunConfig, dump_config, load_config
from mcore_rl.launch import Nodes, exit_code, tell

if TYPE_CHECKING:
    from mcore_rl.planning.plan import Plan

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(commands.app)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, for example examples/demo/grpo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="trainer ranks on this node, through torchrun")] = 1,
    nnodes: Annotated[int, typer.Option(min=1, help="run this command on every one of them")] = 1,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT where the nodes meet; HOST is one of them")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="0 on HOST; without it the nodes agree on an order")] = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved config and the layout, start nothing")] = False,
) -> None:
    """Train a policy as CONFIG says; see docs/launch.md for several nodes."""
    nodes = Nodes(nproc_per_node, nnodes, rdzv_endpoint, node_rank)
    asked = load_config(config, overrides or ())  # before the imports, which take seconds
    from mcore_rl.planning.check import make_plan
    from mcore_rl.run import check_run_folder

    plan = make_plan(asked, nodes.world_size)
    if dry_run:
        print(dump_config(plan.config))
        print(plan.layout.table())
        return
    check_run_folder(plan.config)
    if nodes.world_size == 1:
        from mcore_rl.train import train as run

        run(plan.config)
        return
    sys.stdout.flush()
    options = nodes.torchrun_options(plan.config.name, plan.config.parallel.timeout_s)
    command = [sys.executable, "-m", "mcore_rl.launch", *options, "--", str(config), *(overrides or ())]
    os.execv(sys.executable, command)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="HF folder, for example runs/NAME/hf")],
    prompts: Annotated[list[str], typer.Argument(help="texts to continue")],
    n: Annotated[int, typer.Option(min=1, help="responses a prompt")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Sample responses from a HF folder with vLLM; one JSON object a response."""
    from transformers import AutoTokenizer

    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.data.prompts import encode
    from mcore_rl.model.build import read_hf_config
    from mcore_rl.rollout.vllm.engine import open_engine
    from mcore_rl.types import Prompt, SamplingParams
    from mcore_rl.weights.stored import require_hf

    require_hf(model, "model")
    room = read_hf_config(model).max_position_embeddings - max_tokens
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [Prompt(f"argument/{i}", encode(tokenizer, text, special=True), text) for i, text in enumerate(prompts)]
    for prompt in asked:
        if not 1 <= len(prompt.token_ids) <= room:
            raise ValueError(
                f"prompt {prompt.text[:80]!r} has {len(prompt.token_ids)} tokens; with --max-tokens={max_tokens} this "
                f"model takes 1 to {room}"
            )
    engine = open_engine(
        RolloutConfig(max_response_tokens=max_tokens),
        WeightSyncConfig(),
        model_path=str(model),
        model_dtype=dtype,
        max_prompt_tokens=max(len(p.token_ids) for p in asked),
        world_size=1,
        seed=seed,
    )
    params = SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    with closing(engine):
        for group in engine.generate(asked, params, seed=seed):
            for t in group.trajectories:
                row = {"prompt": group.prompt.text, "response": t.text, "finish_reason": t.finish_reason}
                print(json.dumps({**row, "logprob": float(t.rollout_logprobs.sum(dtype=float))}, ensure_ascii=False))


@app.command()
def pairs(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder for train.jsonl and eval.jsonl")] = Path("pairs"),
    prompts: Annotated[int, typer.Option(min=1, help="training prompts to answer")] = 1024,
    model: Annotated[Path | None, typer.Option(help="HF folder that answers; default: model.path of CONFIG")] = None,
) -> None:
    """Build preference pairs: rollout.group_size answers a prompt, scored; the best against the worst."""
    from rich.console import Console
    from rich.progress import track

    from mcore_rl.planning.plan import rollout_sampling
    from mcore_rl.rollout.collect import score
    from mcore_rl.rollout.pairs import pairs_of, write_rows
    from mcore_rl.run import open_plan_engine

    plan = _engine_plan(load_config(config, overrides or ()), model)
    task, seed = plan.task, plan.config.seed
    asked = {
        "train": [task.train_prompt(i) for i in range(prompts)],
        "eval": task.eval_prompts(plan.config.evaluate.prompts),
    }
    with closing(open_plan_engine(plan)) as engine:
        for split, questions in asked.items():
            rows = []
            step = plan.config.batch.prompts_per_step
            for start in track(range(0, len(questions), step), description=split, console=Console(stderr=True)):
                part = questions[start : start + step]
                groups = engine.generate(part, rollout_sampling(plan.config), seed=seed + start)
                rows += pairs_of(score(group, plan.reward) for group in groups)
            write_rows(out / f"{split}.jsonl", rows)
            print(f"{out / split}.jsonl: {len(rows)} pairs of {len(questions)} prompts")


@app.command()
def lint(config: ConfigFile, overrides: Overrides = None) -> None:
    """List what in CONFIG would learn nothing, or something else than meant. Exit code 2 where that is certain."""
    from mcore_rl import algorithms
    from mcore_rl.planning.lint import lint as findings_of

    asked = load_config(config, overrides or ())
    findings = findings_of(asked, algorithms.load(asked.algorithm.name, **asked.algorithm.fields))
    for finding in findings:
        print(finding)
    if not findings:
        print("nothing found")
    raise typer.Exit(2 if any(f.level == "error" for f in findings) else 0)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="trainer ranks, one a GPU")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu_memory_gb: Annotated[float, typer.Option(min=1, help="of one GPU, in units of 2**30 bytes")] = 80.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, in bytes and elements")] = False,
) -> None:
    """Say whether CONFIG fits WORLD_SIZE GPUs; reads only the model's config.json. Exit code 2: invalid, 1: too big."""
    asked = load_config(config, overrides or ())
    from mcore_rl.planning.estimate import Hardware
    from mcore_rl.planning.fit import plan_run
    from mcore_rl.planning.tables import as_json as report
    from mcore_rl.planning.tables import show

    planned, changes = plan_run(asked, world_size, Hardware(gpus_per_node, gpu_memory_gb))
    if as_json:
        print(json.dumps(report(planned, changes)))
    else:
        show(planned, changes)
    raise typer.Exit(1 if planned.problems else 0)


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="HF folder; default: the final policy of CONFIG's run")] = None,
) -> None:
    """Score a HF folder on CONFIG's held-out prompts; one JSON object."""
    from mcore_rl.run import open_plan_engine
    from mcore_rl.step.evaluating import ask

    asked = load_config(config, overrides or ())
    path = str(model or asked.run_dir / "hf")
    plan = _engine_plan(asked, Path(path))
    with closing(open_plan_engine(plan)) as engine:
        result = ask(engine, plan)
    print(json.dumps({"model": path, **result}))


def _engine_plan(asked: RunConfig, model: Path | None) -> Plan:
    """The plan of a configuration for one engine alone: the trainer's layout plays no part."""
    from mcore_rl.planning.check import make_plan
    from mcore_rl.weights.stored import require_hf

    require_hf(model or asked.model.path, "model" if model else "model.path")
    changes: dict = {"parallel": ParallelConfig(), "evaluate": asked.evaluate.model_copy(update={"sample": True})}
    if model is not None:
        changes["model"] = asked.model.model_copy(update={"path": str(model)})
    return make_plan(asked.model_copy(update=changes), 1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; exit code 2 is a user's mistake, 1 a failure.

    Args:
        arguments: instead of those of the process.
    """
    # as torchrun does: threads of several processes on the same cores wait for each other, up to 30 times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        app(arguments)
    except Exception as error:  # noqa: BLE001  told in words or with its traceback
        tell(error)
        raise SystemExit(exit_code(error)) from None


