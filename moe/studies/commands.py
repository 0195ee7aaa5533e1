"""What every command does, without its command line: measure, and return a `Study`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from moe.judge.watch import THRESHOLDS
from moe.measure.compare import by_update, compare, exactly, four_passes, noise_floor, prefixed
from moe.measure.exact import exact_bias
from moe.measure.flips import load_health, loads
from moe.measure.probe import Probe, sampled_probe
from moe.measure.scoring import batch_of, gradient_estimates, objectives_of, usage
from moe.measure.sweep import ALPHAS, sweep
from moe.record import hf
from moe.studies.setting import Asked, Setting, by_prompt, load_new, open_setting, sampler_of
from moe.studies.study import Study, write


def compare_study(setting: Setting, new_paths: Sequence[Path], dense: tuple[Path, Path] | None = None) -> Study:
    """D1 to D7 and D10 of every later policy against the old one, the noise floor, and a dense control if given."""
    asked, found = setting.asked, []
    for path in new_paths:
        asked.say(f"four passes of {path}")
        passes = four_passes(hf.forward_with_logits, setting.old, load_new(setting, path), setting.probe)
        found.append(compare(passes, setting.probe, asked.draws))
    estimates_ = by_update(found)
    asked.say("noise floor: the same weights again")
    floor = noise_floor(hf.forward_with_logits, setting.old, setting.probe, passes.old_routes, passes.parts.old)
    estimates_ |= floor
    facts = {"new": ", ".join(map(str, new_paths))}
    if dense is not None:
        asked.say("dense control")
        old, new = (hf.load_model(path, getattr(torch, asked.dtype)) for path in dense)
        if hf.routers_of(old):
            raise ValueError(f"--dense {dense[0]}: this model has routers; a control without any is needed")
        control = compare(four_passes(hf.forward_with_logits, old, new, setting.probe), setting.probe, asked.draws)
        estimates_ |= prefixed("dense", control)
        facts["dense"] = f"{dense[0]} to {dense[1]}"
    return Study("compare", asked.command, setting.facts(**facts), estimates_)


def sweep_study(setting: Setting, new_path: Path, alphas: Sequence[float] = ALPHAS) -> Study:
    """D4: the same change of weights at many sizes."""
    asked = setting.asked
    scratch = load_new(setting, new_path)
    weights = {name: weight.clone() for name, weight in scratch.state_dict().items()}

    def told(alpha: float) -> None:
        asked.say(f"step a = {alpha:g}")

    found = sweep(
        hf.forward_with_logits, setting.old, scratch, weights, setting.probe, sorted(alphas)[::-1], asked.draws, told
    )
    return Study("sweep", asked.command, setting.facts(new=str(new_path)), found)


def objectives_study(
    setting: Setting, new_path: Path, num_prompts: int = 24, parameters: str = "", sigmas: Sequence[float] = (0.1, 1.0)
) -> Study:
    """D8: one batch under every objective.

    Args:
        num_prompts: prompts with different rewards that the gradients are taken of.
        parameters: regular expression of the names of the parameters that are differentiated; "": all.

    Raises:
        ValueError: no rewards, no prompt with different ones, or no parameter of that name.
    """
    asked = setting.asked
    new = load_new(setting, new_path)
    chosen = [weight for name, weight in new.named_parameters() if re.search(parameters, name)]
    if not chosen:
        raise ValueError(f"--parameters {parameters!r} matches none, e.g. not {next(new.named_parameters())[0]!r}")
    probe, prompts = _instructive(setting.probe, num_prompts)
    batch = batch_of(hf.forward_with_logits, setting.old, new, probe)
    named = objectives_of(batch)
    facts, fresh = {"gradient of": f"{sum(p.numel() for p in chosen)} parameters, {len(prompts)} prompts"}, None
    if asked.prompts is not None:
        asked.say(f"fresh answers of {new_path}")
        sampler = sampler_of(new, asked, asked.seed + 1)
        fresh = by_prompt(sampled_probe([setting.rows[i] for i in prompts], setting.tokenizer, sampler))
    else:
        facts["bias"] = "not measured: fresh answers cannot be judged without --prompts"
    found = usage(batch, named, asked.draws) | gradient_estimates(
        hf.forward_with_logits,
        new,
        batch,
        named,
        chosen,
        fresh=fresh,
        sigmas=sigmas,
        draws=asked.draws,
        seed=asked.seed,
        told=asked.say,
    )
    return Study("objectives", asked.command, setting.facts(new=str(new_path), **facts), found)


def _instructive(probe: Probe, num_prompts: int) -> tuple[Probe, list[int]]:
    """The answers to the first prompts, and which prompts these are."""
    prompts = list(range(min(num_prompts, int(probe.prompt_ids.max()) + 1)))
    kept = [i for i, prompt in enumerate(probe.prompt_ids.tolist()) if prompt in set(prompts)]
    return probe.subset(kept), prompts


def exact_study(command: str) -> Study:
    """The exact bias of every objective on policies that can be enumerated."""
    rows = exact_bias()
    found = {}
    for row in rows:
        label = f"exact/{row.alpha:g}/{row.objective}"
        found |= {f"{label}/{name}": exactly(getattr(row, name)) for name in ("bias", "variance", "cosine")}
        found[f"exact/{row.alpha:g}/spread"] = exactly(row.spread)
    facts = {"policies": "6 seeds of random bigram tables, 3 tokens, answers of 6: all 729 summed; medians over seeds"}
    return Study("exact", command, facts, found)


def record_study(asked: Asked, model_path: Path, out: Path) -> Study:
    """Answers and their routes, on disk: OUT/rollouts.jsonl (token ids, log-probs, rewards), OUT/routes.safetensors."""
    setting = open_setting(asked, model_path)
    probe, model = setting.probe, setting.old
    with torch.no_grad():
        logprobs, trace, _ = hf.forward_with_logits(model, probe.sequences, None)
    if trace.expert_ids.shape[1] == 0:
        raise ValueError(f"{str(model_path)!r} has no experts, so no routes to record")
    out.mkdir(parents=True, exist_ok=True)
    scored = probe.scored(logprobs).split(probe.answers.lengths.tolist())
    lines = []
    for i, (sequence, start) in enumerate(zip(probe.sequences, probe.prompt_lengths)):
        row = {"prompt": list(sequence[:start]), "response": list(sequence[start:]), "logprobs": scored[i].tolist()}
        if probe.rewards is not None:
            row["reward"] = float(probe.rewards[i])
        lines.append(json.dumps(row) + "\n")
    write(out / "rollouts.jsonl", "".join(lines))
    trace.save(out / "routes.safetensors")
    health = load_health(loads(trace.expert_ids[probe.rows], trace.num_experts))
    quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9], dtype=torch.float64)
    margins = trace.margins[probe.rows].double().flatten()
    found = {"record/bytes_per_token": exactly(trace.bytes_per_token)}
    found |= {f"record/margin_quantile/{q:g}": exactly(margins.quantile(q)) for q in quantiles.tolist()}
    for name, values in health.items():
        found |= {f"record/load_{name}/layer_{i}": exactly(x) for i, x in enumerate(values.tolist())}
    return Study("record", asked.command, setting.facts(), found)


def watch_study(command: str, run: Path) -> Study:
    """The routers' metrics of a training run, as series.

    Raises:
        ValueError: no metrics.jsonl, or none of its metrics is about routers, mismatch, or the policy.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}; pass the folder of a training run") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # the last line may be being written
                raise ValueError(f"{path}:{number}: not a line of metrics: {error}") from error
    wanted = {t.metric for t in THRESHOLDS} | {"eval/accuracy"}
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in wanted or name.startswith("moe/"):
                series.setdefault(name, []).append((row["step"], float("nan") if value is None else float(value)))
    if not any(name.startswith(("moe/", "mismatch/")) for name in series):
        raise ValueError(f"{str(path)!r} holds no metric of the routers; train with moe.log_every=10")
    facts = {"run": str(run), "steps": rows[-1]["step"], "looks at the routers": len(series.get("moe/flip_any", []))}
    return Study("watch", command, facts, {}, series)
