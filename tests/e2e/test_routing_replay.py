"""Whole runs under routing replay, with real Megatron and real vLLM."""

from __future__ import annotations

import math

import pytest
import torch
from rollout_reference import save_character_tokenizer
from runs import command, rows, tiny
from safetensors.torch import load_file
from tiny_models import save_tiny_hf

from moe.record.trace import RoutingTrace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense layer between the MoE layers, and expert widths that vLLM's bf16 kernels take."""
    folder = save_tiny_hf(tmp_path_factory.mktemp("model"), mlp_only_layers=[1], moe_intermediate_size=64)
    save_character_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """metrics.jsonl by step of two steps of GRPO, two optimizer steps each, for (mode, engine's dtype, settings)."""
    done = {}

    def started(mode: str, dtype: str = "float32", **settings):
        key = (mode, dtype, *settings)
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            sections = dict(moe={"routing_replay": mode}, batch={"mini_batches": 2, "micro_batch_tokens": 40})
            config = tiny(folder, model, rollout={"dtype": dtype}, weight_sync={"max_logprob_diff": 3}, **sections)
            arguments = [f"{k}={v}" for k, v in settings.items()]
            code, _, errors = command(folder, "train", "config.yaml", *arguments)
            assert code == 0, errors
            done[key] = rows(folder / "runs" / config["name"])
            done[key]["folder"] = folder / "runs" / config["name"]
        return done[key]

    return started


def test_the_three_modes_are_the_same_where_the_engines_routes_are_the_trainers(run):
    """In fp32 all choose the same experts, so a route that went to the wrong token or layer shows in the mismatch."""
    natural, old, rollout = run("none"), run("old"), run("rollout")
    for mode in (natural, old, rollout):
        assert mode[1]["mismatch/abs_max"] < 1e-5 and mode[2]["mismatch/abs_max"] < 1e-5
    natural, old, rollout = natural[1], old[1], rollout[1]  # from the second step on, samples may differ
    assert old["policy/loss"] == pytest.approx(rollout["policy/loss"], abs=1e-6)
    assert old["optimizer/grad_norm_max"] == pytest.approx(rollout["optimizer/grad_norm_max"], rel=1e-4)
    # without replay the second optimizer step sees new routes: only nearly the same update
    assert old["optimizer/grad_norm_mean"] == pytest.approx(natural["optimizer/grad_norm_mean"], rel=0.1)


def test_the_engines_routes_are_replayed_where_they_differ(run):
    """bf16 engine, fp32 trainer: tokens that bf16 sends elsewhere differ most, and replay removes just that."""
    many = {"batch.prompts_per_step": 48, "batch.micro_batch_tokens": 2000, "steps": 1}  # some tokens lie near a tie
    free, replayed = run("none", "bfloat16", **many)[1], run("rollout", "bfloat16", **many)[1]
    assert replayed["mismatch/k3"] < free["mismatch/k3"]


def test_tokens_weigh_nothing_once_their_routers_have_moved(run):
    """Floor 1: in the first optimizer step of a rollout nothing has moved and all weigh 1, in the second none does."""
    shifted = run("none", **{"moe.router_shift": "true", "moe.router_shift_floor": 1})[1]
    assert 0.3 < shifted["policy/router_shift_mean"] < 0.7  # of the tokens of both
    assert shifted["policy/router_shift_masked_frac"] == pytest.approx(1 - shifted["policy/router_shift_mean"])
    assert shifted["optimizer/grad_norm_mean"] == pytest.approx(shifted["optimizer/grad_norm_max"] / 2)


def test_routers_are_watched(run):
    """The fp32 engine takes the trainer's routes; one step moves some; what is kept can be read."""
    settings = {"moe.log_every": 1, "moe.record_every": 2, "rollout.return_routes": "true"}
    watched = run("none", **settings)
    for step in (1, 2):
        assert watched[step]["mismatch/flip_any"] == 0
        assert 0 < watched[step]["moe/flip_expert"] <= watched[step]["moe/flip_any"] <= 1
        assert watched[step]["moe/chi"] > 0 and 0 < watched[step]["moe/share_routing"] < 1
        assert watched[step]["moe/layer_02/flip_set"] >= 0 and "moe/layer_03/flip_set" not in watched[step]
        assert 0 < watched[step]["moe/router_entropy"] < math.log(8)
        assert 0 < watched[step]["moe/gamma_mean"] < 1 and watched[step]["moe/alarm_level"] in (0, 1, 2)
    for name, value in run("none")[1].items():  # watching changes nothing
        if name.startswith(("policy/", "optimizer/", "reward/")):
            assert watched[1][name] == value
    folder = watched["folder"] / "routes"
    before, after = (
        RoutingTrace.load(folder / f"step_000002.rank_0.{when}.safetensors") for when in ("before", "after")
    )
    tokens = load_file(folder / "step_000002.rank_0.tokens.safetensors")
    assert before.expert_ids.shape == after.expert_ids.shape == (len(tokens["token_ids"]), 3, 2)
    assert not torch.equal(before.expert_ids, after.expert_ids) and len(list(folder.iterdir())) == 3


def test_the_policy_after_every_optimizer_step_of_a_rollout(run):
    folder = run("none", **{"moe.export_every": 2})["folder"]
    assert {path.relative_to(folder / "updates").as_posix() for path in folder.glob("updates/*/*")} == {
        "step_000002/1",
        "step_000002/2",
    }
    first, second, final = (
        load_file(path / "model.safetensors") for path in (*sorted(folder.glob("updates/*/*")), folder / "hf")
    )
    assert all(torch.equal(second[name], weight) for name, weight in final.items())
    assert not all(torch.equal(first[name], weight) for name, weight in final.items())


def test_a_frozen_router_keeps_its_weights(run, model):
    trained = load_file(run("none", **{"model.freeze_router": "true"})["folder"] / "hf" / "model.safetensors")
    before = load_file(model / "model.safetensors")
    changed = {name for name, weight in trained.items() if not torch.equal(weight, before[name])}
    gates = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(gates) == 3 and not gates & changed and changed >= {n for n in before if "expert" not in n} - gates
