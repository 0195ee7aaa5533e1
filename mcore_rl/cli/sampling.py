"""mcore-rl generate, pairs, evaluate: a rollout engine without a trainer."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcore_rl.cli.runs import ConfigFile, Overrides
from mcore_rl.config import ParallelConfig, RunConfig, load_config

if TYPE_CHECKING:
    from mcore_rl.planning.plan import Plan

app = typer.Typer()


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
    asked = load_config(config, overrides or ())
    from rich.console import Console
    from rich.progress import track

    from mcore_rl.planning.plan import rollout_sampling
    from mcore_rl.rollout.collect import score
    from mcore_rl.rollout.pairs import pairs_of, write_rows
    from mcore_rl.run import open_plan_engine

    plan = engine_plan(asked, model)
    task, seed = plan.task, plan.config.seed
    splits = {
        "train": [task.train_prompt(i) for i in range(prompts)],
        "eval": task.eval_prompts(plan.config.evaluate.prompts),
    }
    with closing(open_plan_engine(plan)) as engine:
        for split, questions in splits.items():
            rows = []
            step = plan.config.batch.prompts_per_step
            for start in track(range(0, len(questions), step), description=split, console=Console(stderr=True)):
                part = questions[start : start + step]
                groups = engine.generate(part, rollout_sampling(plan.config), seed=seed + start)
                rows += pairs_of(score(group, plan.reward) for group in groups)
            write_rows(out / f"{split}.jsonl", rows)
            print(f"{out / split}.jsonl: {len(rows)} pairs of {len(questions)} prompts")


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="HF folder; default: the final policy of CONFIG's run")] = None,
) -> None:
    """Score a HF folder on CONFIG's held-out prompts; one JSON object."""
    asked = load_config(config, overrides or ())
    from mcore_rl.run import open_plan_engine
    from mcore_rl.step.evaluating import ask

    path = str(model or asked.run_dir / "hf")
    plan = engine_plan(asked, Path(path))
    with closing(open_plan_engine(plan)) as engine:
        result = ask(engine, plan)
    print(json.dumps({"model": path, **result}))


def engine_plan(asked: RunConfig, model: Path | None) -> Plan:
    """The plan of a configuration for one engine alone: the trainer's layout plays no part."""
    from mcore_rl.planning.check import make_plan
    from mcore_rl.weights.stored import require_hf

    require_hf(model or asked.model.path, "model" if model else "model.path")
    changes: dict = {"parallel": ParallelConfig(), "evaluate": asked.evaluate.model_copy(update={"sample": True})}
    if model is not None:
        changes["model"] = asked.model.model_copy(update={"path": str(model)})
    return make_plan(asked.model_copy(update=changes), 1)
