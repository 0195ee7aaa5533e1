"""`mcore-rl plan`: exact parameters, hand-counted memory, groups and bubbles, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from runs import command
from transformers import Qwen3Config, Qwen3MoeConfig

from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig, load_config, parse_config
from mcore_rl.model.build import transformer_config
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.estimate import Hardware
from mcore_rl.planning.fit import plan_run
from mcore_rl.planning.grid import group_grid, spell
from mcore_rl.planning.memory import GIB, activations, trained_state
from mcore_rl.planning.needs import RESERVE
from mcore_rl.planning.parameters import buffer_numel, held_parameters, model_parameters
from mcore_rl.planning.tables import as_json, show
from tools.bench.models import QWEN3_30B

# config.json of the published models, what matters for shapes
QWEN3_235B = QWEN3_30B | dict(
    hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64
)
QWEN3_0_6B = dict(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


@pytest.fixture
def folder(tmp_path):
    """A run of Qwen3-30B-A3B as `run.yaml`, with config.json alone in `model`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_30B))
    run = {
        "name": "q30",
        "model": {"path": str(tmp_path / "model"), "dtype": "bfloat16", "recompute": "full"},
        "algorithm": {"name": "grpo", "kl_coef": 0.001},
        "parallel": {"tp": 2, "ep": 8, "pp": 2, "distributed_optimizer": True},
        "rollout": {"group_size": 8, "max_response_tokens": 8192, "tensor_parallel_size": 2},
        "batch": {"prompts_per_step": 128, "micro_batch_tokens": 16384},
        "data": {"max_prompt_tokens": 1024},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def planned(folder, world=32, hardware=None, **sections):
    values = yaml.safe_load((folder / "run.yaml").read_text())
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return plan_run(parse_config(values), world, hardware or Hardware())


@pytest.mark.parametrize(
    ("published", "total", "active"),
    [(QWEN3_30B, 30.5e9, 3.3e9), (QWEN3_235B, 235e9, 22e9)],
    ids=["Qwen3-30B-A3B", "Qwen3-235B-A22B"],
)
def test_published_totals(published, total, active):
    """Within the digits that the models' cards print."""
    hf = Qwen3MoeConfig(**published)
    assert model_parameters(hf) == pytest.approx((total, active), rel=0.02)
    if published is QWEN3_30B:
        assert round(model_parameters(hf)[0] / 1e9, 1) == 30.5
    assert sum(chunk.total for chunk in held_parameters(hf, ParallelLayout(), 0)) == model_parameters(hf)[0]


def test_a_dense_model_with_tied_embeddings_counts_them_once():
    hf = Qwen3Config(**QWEN3_0_6B, architectures=["Qwen3ForCausalLM"])
    total, active = model_parameters(hf)
    assert total == active == 596_049_920  # 0.44B without the embedding, as its card says
    assert total - 151936 * 1024 == 440_467_456
    # the last stage of a pipeline has a copy
    stages = [sum(c.total for c in held_parameters(hf, ParallelLayout(pp=2), stage)) for stage in (0, 1)]
    assert sum(stages) == total + 151936 * 1024


def test_every_rank_of_a_layout_holds_its_share():
    """Experts are divided by ep and pp, the rest by tp and pp, but for norms and router, which tp does not cut."""
    hf = Qwen3MoeConfig(**QWEN3_30B)
    layout = ParallelLayout(tp=2, pp=2, ep=8, dp=8)
    (chunk,) = held_parameters(hf, layout, 0)
    assert sum(chunk.experts) == 24 * 16 * 3 * 2048 * 768
    uncut = 24 * (2 * 2048 + 2 * 128 + 128 * 2048)
    cut = 24 * (2048 * (4096 + 2 * 512) + 4096 * 2048) + 151936 * 2048
    assert sum(chunk.dense) == uncut + cut // 2


def test_buffers_of_the_distributed_optimizer_are_padded():
    """Megatron starts every parameter at a multiple of 64 and ends the buffer at one of lcm(ranks, 128)."""
    assert buffer_numel((100, 10), 3, padded=False) == 110
    assert buffer_numel((100, 10), 3, padded=True) == 384  # 10 -> 64, + 100 = 164, lcm 384
    assert buffer_numel((), 3, padded=True) == 0


@pytest.mark.parametrize(
    ("dtype", "sharded", "name", "bytes_a_parameter"),
    [
        ("float32", False, "adam", 4 + 4 + 8),
        ("bfloat16", False, "adam", 2 + 4 + 12),
        ("float32", True, "adam", 4 + 4 + 8 / 4),
        ("bfloat16", True, "adam", 2 + 4 + 12 / 4),
        ("bfloat16", False, "sgd", 2 + 4 + 4),
    ],
)
def test_bytes_a_parameter(dtype, sharded, name, bytes_a_parameter):
    hf = Qwen3Config(**QWEN3_0_6B, architectures=["Qwen3ForCausalLM"])
    arguments = ModelConfig(path=".", dtype=dtype), OptimizerConfig(name=name)
    state = trained_state(hf, ParallelLayout(dp=4), 0, *arguments, ParallelConfig(distributed_optimizer=sharded))
    assert state.bytes == pytest.approx(state.parameters * bytes_a_parameter, rel=1e-5)


def test_activations_shrink_with_recomputation_and_tensor_parallelism():
    hf = Qwen3MoeConfig(**QWEN3_30B)
    models = {r: ModelConfig(path=".", dtype="bfloat16", recompute=r) for r in ("none", "selective", "full")}
    shape = transformer_config(hf, models["none"], ParallelLayout())
    rest = 4096, 512, hf.vocab_size
    kept = {r: activations(shape, ParallelLayout(pp=2), 0, m, *rest).kept for r, m in models.items()}
    assert kept["full"] == 24 * 4096 * 2048 * 2  # the input of every layer
    assert kept["full"] < kept["selective"] / 10 < kept["none"] / 10
    halved = activations(shape, ParallelLayout(pp=2, tp=2), 0, models["none"], *rest).kept
    assert halved == pytest.approx(kept["none"] / 2, rel=0.01)


def test_groups_of_a_grid():
    """16 ranks on nodes of 4: dense 2 x 2 x 4, experts 4 x 2; written down by hand from rank = ((pp*DP+dp)*TP+tp)."""
    grid = {g.axis: g for g in group_grid(ParallelLayout(tp=2, pp=2, dp=4, ep=4), gpus_per_node=4)}
    assert set(grid) == {"tp", "dp", "pp", "ep", "edp"}
    assert grid["tp"].groups[:2] == ((0, 1), (2, 3)) and grid["tp"].crossing == 0
    assert grid["dp"].groups == ((0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15))
    assert grid["ep"].groups == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
    assert grid["ep"].crossing == 0 and grid["edp"].groups[0] == (0, 4) and grid["edp"].crossing == 8
    assert grid["pp"].groups[3] == (3, 11) and not grid["pp"].is_slow
    wide = {g.axis: g for g in group_grid(ParallelLayout(tp=2, dp=8, ep=8), gpus_per_node=4)}
    assert wide["ep"].is_slow and wide["ep"].crossing == 2
    assert [spell(r) for r in ((0, 1, 2), (0, 2, 4), (7,), (0, 16))] == ["0-2", "0-4 by 2", "7", "0,16"]


@pytest.mark.parametrize(
    ("parallel", "micro_batches", "bubble"),
    [
        ({"pp": 2, "ep": 8, "tp": 2}, 128, 1 / 129),
        ({"pp": 4, "ep": 4, "tp": 2}, 256, 3 / 259),
        ({"pp": 4, "vpp": 2, "ep": 4, "tp": 2}, 256, 3 / 515),
        ({"pp": 1, "ep": 8, "tp": 2}, 64, 0),
    ],
    ids=str,
)
def test_schedule(folder, parallel, micro_batches, bubble):
    """1024 responses of 9216 tokens: one fits a micro-batch of 16384, over dp = 32 / (tp pp) ranks."""
    estimate, _ = planned(folder, parallel={"distributed_optimizer": True, **parallel})
    assert estimate.schedule.micro_batches == micro_batches
    assert estimate.schedule.positions == 9216
    assert estimate.schedule.bubble == pytest.approx(bubble)


def test_the_engine_lies_on_the_first_gpus(folder):
    estimate, changes = planned(folder)
    assert not estimate.problems and not changes
    assert [(p.ranks[0], p.ranks[-1]) for p in estimate.places] == [(0, 1), (2, 15), (16, 31)]
    engine = estimate.engine
    assert engine.weights == 30_532_122_624  # bf16 over two GPUs
    assert engine.token_bytes == 2 * 48 * 2 * 128 * 2  # k and v, layers, heads a GPU, head size, bf16
    assert engine.kv_cache == pytest.approx(0.4 * 80 * GIB - engine.weights - 1.5 * GIB, abs=1)
    assert engine.sequences == engine.kv_cache // (engine.token_bytes * 9216)
    with_engine, without, last = estimate.places
    engine_bytes = estimate.peak_bytes(with_engine) - estimate.peak_bytes(without)
    assert engine_bytes == pytest.approx(0.4 * 80 * GIB, abs=8)
    assert {u.role for u in without.uses} == {"policy", "reference", "other"}
    assert "logits" not in {u.what for u in without.uses} and "logits" in {u.what for u in last.uses}
    served, _ = planned(folder, rollout={"placement": "server", "server_url": "http://host:1"})
    assert [(p.ranks[0], p.ranks[-1]) for p in served.places] == [(0, 0), (1, 15), (16, 31)]
    first, second, _ = served.places
    assert served.peak_bytes(first) - served.peak_bytes(second) == 2 * GIB  # vLLM's two buffers of the nccl transfer


def test_a_run_that_samples_nothing_has_no_engine(folder, capsys):
    preferences = {"name": "dpo", "kl_coef": 0}
    dpo, _ = planned(folder, algorithm=preferences)
    estimate, changes = planned(folder, algorithm=preferences, evaluate={"sample": False})
    assert dpo.engine is not None and estimate.engine is None and not estimate.problems and estimate.excess_bytes == 0
    assert [p.ranks[0] for p in estimate.places] == [0, 16] and not estimate.host_bytes
    assert not [use for place in estimate.places for use in place.uses if use.role == "engine"]
    show(estimate, changes)
    assert "engine: none" in capsys.readouterr().out and as_json(estimate, changes)["engine"] is None


def test_an_fp32_head_is_copied_where_the_model_is_bf16(folder):
    def logits(**model) -> int:
        estimate, _ = planned(folder, model=model)
        return next(use.bytes for use in estimate.places[-1].uses if use.what == "logits")

    copied = logits(fp32_head=True) - logits()
    # a tensor rank's vocabulary, hidden size; the copy and its gradient, fp32; without, a chunk's logits in bf16
    assert copied == 151_936 // 2 * (2048 * 2 * 4 - 1024 * 2)
    assert logits(dtype="float32", fp32_head=True) == logits(dtype="float32")


def test_a_sleeping_engine_and_the_trainer_take_turns(folder):
    awake, _ = planned(folder)
    asleep, _ = planned(folder, rollout={"sleep": True})
    place = asleep.places[0]
    sums = {w: sum(u.bytes for u in place.uses if u.when == w) for w in ("always", "passes", "rollout")}
    assert asleep.peak_bytes(place) == sums["always"] + max(sums["passes"], sums["rollout"])
    assert awake.peak_bytes(place) == sum(sums.values())


def test_what_is_offloaded_takes_turns_with_the_rest_and_waits_in_the_host(folder):
    kl = {"algorithm": {"name": "grpo", "kl_coef": 0.1}}
    held, _ = planned(folder, **kl)
    moved, _ = planned(folder, **kl, reference={"offload": True}, optimizer={"offload": True})
    for before, after in zip(held.places, moved.places, strict=True):
        of = {(u.role, u.what): u.bytes for u in before.uses}
        reference, state, passes = of["reference", "weights"], of["policy", "optimizer"], of["policy", "activations"]
        passes += of.get(("policy", "logits"), 0)
        freed = reference + state + passes - max(reference, state, passes)
        assert before.peak_bytes(False) - after.peak_bytes(False) == freed > 0
    first_node = [(p, len([r for r in p.ranks if r < 8])) for p in moved.places]
    assert moved.host_bytes["the reference's weights, offloaded"] == sum(
        n * u.bytes for p, n in first_node for u in p.uses if u.role == "reference"
    )
    assert moved.host_bytes.keys() - held.host_bytes.keys() == {
        "the reference's weights, offloaded",
        "the policy's optimizer, offloaded",
    }


def test_roles(folder):
    """PPO trains a critic of the policy's size but for its head; nothing but weights is held of a reference."""
    estimate, _ = planned(folder, algorithm={"name": "ppo", "kl_coef": 0.1})
    place = estimate.places[-1]
    assert place.parameters.keys() == {"policy", "critic", "reference"}
    assert place.parameters["policy"] - place.parameters["critic"] == 151936 * 2048 // 2 - 2048
    assert {u.what for u in place.uses if u.role == "reference"} == {"weights"}
    assert {u.what for u in place.uses if u.role == "critic"} == {"weights", "gradients", "optimizer"}
    assert sum(u.bytes for u in place.uses if u.what == "reserve") == RESERVE


def test_a_reference_of_its_own_layout(folder):
    """Its stages are other ranks' than the policy's: what is counted is the fullest rank of each."""
    kl = {"algorithm": {"name": "grpo", "kl_coef": 0.1}}
    same, _ = planned(folder, **kl)
    alone, _ = planned(folder, **kl, reference={"parallel": {"ep": 32}})
    total, experts = 30_532_122_624, 48 * 128 * 3 * 2048 * 768
    assert {p.parameters["reference"] for p in alone.places} == {total - experts + experts // 32}
    assert {p.parameters["policy"] for p in alone.places} == {p.parameters["policy"] for p in same.places}
    with pytest.raises(ValueError, match=r"reference.parallel: parallel.ep\*etp=3"):
        planned(folder, **kl, reference={"parallel": {"ep": 3}})


def test_a_discriminator_counts_like_a_critic_and_may_be_another_model(folder):
    (folder / "small").mkdir()
    (folder / "small" / "config.json").write_text(json.dumps(QWEN3_30B | {"num_hidden_layers": 24}))
    gapo = {"name": "gapo", "baseline": "group", "kl_coef": 0.0}
    for section, layers in (({}, 48), ({"path": str(folder / "small")}, 24)):
        estimate, _ = planned(folder, algorithm=gapo, discriminator=section)
        place = estimate.places[-1]
        assert place.parameters.keys() == {"policy", "discriminator"}
        assert estimate.models.scorers["discriminator"].num_hidden_layers == layers
        assert {u.what for u in place.uses if u.role == "discriminator"} == {"weights", "gradients", "optimizer"}
    assert place.parameters["discriminator"] < 0.55 * place.parameters["policy"]


def test_advice_is_tried_and_fits(folder):
    """The whole model on every engine GPU does not fit; what is proposed does, by the same estimate."""
    estimate, changes = planned(folder, rollout={"tensor_parallel_size": 1})
    assert len(estimate.problems) == 2 and "rank 0, stage 0: " in estimate.problems[0]
    assert [c.words for c in changes] == ["rollout.tensor_parallel_size=2"]
    assert changes[-1].missing_bytes == 0 and not planned(folder)[0].problems
    hopeless, changes = planned(folder, world=4, hardware=Hardware(gpu_memory_gb=8), parallel={"ep": 1})
    assert hopeless.problems and (not changes or changes[-1].missing_bytes < hopeless.excess_bytes)


@pytest.mark.parametrize(("name", "world", "fits"), [("grpo", 16, True), ("ppo", 16, False), ("ppo", 32, True)])
def test_what_the_examples_say_of_themselves(folder, name, world, fits):
    """examples/qwen3_30b_a3b/README.md: two nodes for all but PPO and GAPO, which need four."""
    path = Path(__file__).parents[2] / "examples" / "qwen3_30b_a3b" / f"{name}.yaml"
    config = load_config(path, [f"model.path={folder / 'model'}"])
    estimate, changes = plan_run(config, world, Hardware())
    assert (not estimate.problems) == fits and bool(changes) != fits


def test_command(folder):
    code, out, err = command(folder, "plan", "run.yaml", "--world-size", "32")
    assert code == 0 and not err
    for words in ("30.53B parameters, 3.35B used by a token", "{0,16} .. {15,31}", "bubble 0.8%", "it fits"):
        assert words in out
    code, out, _ = command(folder, "plan", "run.yaml", "--world-size=32", "--json", "rollout.tensor_parallel_size=1")
    report = json.loads(out)
    assert code == 1 and not report["fits"] and report["changes"][0]["words"] == "rollout.tensor_parallel_size=2"
    assert report["parameters"] == 30_532_122_624 and report["groups"]["tp"]["ranks"][0] == [0, 1]
    for arguments, words in {
        ("--world-size=6",): "6 ranks cannot hold parallel.tp*pp*cp=2*2*1=4",
        ("--world-size=32", "parallel.pp=5"): "32 ranks cannot hold",
        ("--world-size=24", "parallel.tp=3", "parallel.ep=1"): "tp=3 must divide the model's num_attention_heads=32",
        ("--world-size=32", "model.path=nowhere"): "model.path='nowhere' does not exist",
    }.items():
        code, out, err = command(folder, "plan", "run.yaml", *arguments)
        assert code == 2 and words in err and not out, err


def test_a_terminal_gets_rich_tables(folder, monkeypatch, capsys):
    from mcore_rl.planning import tables as report

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    report.show(*planned(folder))
    out = capsys.readouterr().out
    assert "process groups of more than one rank" in out and "─" in out and "it fits" in out
