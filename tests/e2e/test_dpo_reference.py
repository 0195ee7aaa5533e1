"""DPO through the command line, with the reference's log-probs scored once; the same on several ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from runs import command, rows, tiny
from safetensors import safe_open
from worlds import each_world, run_worlds


def dpo(folder: Path, model: Path, **sections):
    """A tiny DPO run; one response belongs to two pairs."""
    lines = [
        {"prompt": f"{d}=", "answer": a, "chosen": f"#{a}", "rejected": r}
        for d, a, r in (("21", "12", "#21"), ("21", "12", "21"), ("534", "345", "#453"), ("98", "89", "#98"))
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = {"task": "file", "train_file": str(folder / "pairs.jsonl"), "eval_file": str(folder / "pairs.jsonl")}
    config = tiny(folder, model, algorithm={"name": "dpo"}, reward="regex:^#", steps=1, **sections)
    config["data"] = data
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return config


def test_scored_once_and_then_read(tmp_path, model, worker):
    dpo(tmp_path, model)

    def run(*overrides):
        code, out, err = worker(command, tmp_path, "train", "config.yaml", *overrides)
        return code, [line for line in out.splitlines() if "reference log-probs" in line], err

    code, said, err = run("name=first")
    assert code == 0, err
    assert len(said) == 1 and "of 7 responses computed" in said[0]
    code, said, err = run("name=second", "seed=1", "algorithm.beta=0.3")
    assert code == 0 and "of 7 responses read" in said[0], err
    code, said, err = run("name=held", "reference.precompute=false")
    assert code == 0 and not said, err
    first, second, held = (rows(tmp_path / "runs" / name) for name in ("first", "second", "held"))
    for by_step in (first, second, held):
        assert by_step[0]["eval/pairs_margin"] == pytest.approx(0, abs=1e-6) and by_step[1]["eval/pairs_margin"] > 1e-3
    assert "memory/reference_parameters" not in first[0] and held[0]["memory/reference_parameters"] > 1e5
    assert first[1]["policy/loss"] == pytest.approx(held[1]["policy/loss"], rel=1e-5)

    (cache,) = (tmp_path / "runs" / "reference_logprobs").iterdir()
    code, _, err = run("name=wrong", f"reference.cache_dir={tampered(cache)}")
    assert code == 2 and "the policy starts as its reference, but" in err and "differ by up to 0.25;" in err
    code, said, err = run("name=elsewhere", f"reference.path={other_weights(model, tmp_path / 'other')}")
    assert code == 0 and "computed" in said[0], err
    assert abs(rows(tmp_path / "runs" / "elsewhere")[0]["eval/pairs_margin"]) > 1e-4, "on purpose, so it is no mistake"


def tampered(cache: Path) -> Path:
    """A folder with the same file, sound, in which every log-prob is 0.25 less."""
    from mcore_rl.roles.given_logprobs import read, write

    with safe_open(cache, framework="pt") as file:
        description = file.metadata()
    folder = cache.parent.parent / "tampered"
    write(folder / cache.name, {k: v - 0.25 for k, v in read(cache).items()}, description)
    return folder


def other_weights(model: Path, folder: Path) -> Path:
    from tools.make_demo_model import make_demo_model

    make_demo_model(folder, seed=1)
    return folder


# ---------------------------------------------------------------------------------------------- two ranks, no engine

LAYOUTS = [dict(dp=2, ep=2), dict(tp=2), dict(pp=2)]


def test_two_ranks(tmp_path, model):
    """Every rank ends with all log-probs, those of one rank; the second time they are read and are the same bits."""
    dpo(tmp_path, model)
    cases = [dict(layout=layout, folder=str(tmp_path), out=f"{i}.pt") for i, layout in enumerate([{}, *LAYOUTS])]
    run_worlds(__file__, cases[:1], 1)
    run_worlds(__file__, cases[1:], 2)
    alone, *together = (torch.load(tmp_path / case["out"]) for case in cases)
    assert len(alone) == 7
    for found in together:
        assert found.keys() == alone.keys()
        assert all(torch.allclose(found[k], alone[k], atol=2e-5) for k in alone)


def run_case(case, groups) -> None:
    from mcore_rl.config import load_config
    from mcore_rl.planning.check import make_plan
    from mcore_rl.roles.models import Models
    from mcore_rl.roles.reference import load_reference
    from mcore_rl.step.reference import with_reference

    sizes = [f"parallel.{k}={v}" for k, v in case["layout"].items() if k != "dp"]
    plan = make_plan(load_config(Path(case["folder"]) / "config.yaml", sizes), groups.world_size)
    models = Models(trained={}, policy=load_reference(plan, groups))
    first, second = (with_reference(plan, groups, models, started=False).reference.rows for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    if groups.rank == groups.world_size - 1:
        torch.save(first, Path(case["folder"]) / case["out"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    each_world(sys.argv[1], run_case)
