"""Hugging Face -> Megatron -> Hugging Face in one process: every family, layouts of any size, and every damage."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_tiny_hf
from transformers import AutoModelForCausalLM

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.convert import to_hf, to_megatron
from mcore_rl.weights.stored import load_weights, open_weights
from mcore_rl.weights.verify import compare

SPARSE = {"deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
THOROUGH = {
    "deepseek_v3",
    "qwen3",
    "qwen3_moe",
}  # the others, of much the same rows, in part
DENSE_LAYOUTS = [
    dict(),
    dict(tp=2),
    dict(tp=4),  # more ranks than key/value heads, where there are 2
    dict(pp=2),
    dict(pp=3),  # 4 layers: 2, 1, 1
    dict(pp=2, vpp=2),
    dict(tp=4, pp=4),
    dict(tp=2, pp=3, dp=2),
    dict(tp=2, pp=2),
    dict(pp=4),
    dict(tp=2, pp=2, vpp=2),
    dict(tp=4, pp=2, vpp=2, dp=2),
]
EXPERT_LAYOUTS = [
    dict(dp=4, ep=4),
    dict(dp=2, etp=2),
    dict(tp=2, dp=2, ep=2, etp=2),
    dict(tp=4, ep=2, etp=2),
    dict(tp=2, pp=2, vpp=2, dp=4, ep=8),
    dict(pp=3, dp=4, ep=4),
    dict(tp=4, pp=4, dp=64, ep=8, etp=4),  # 1024 ranks
]
QUICK = [dict(tp=4), dict(tp=2, pp=3, dp=2), dict(tp=2, pp=2, vpp=2, dp=4, ep=8)]
CASES = [
    pytest.param(family, axes, marks=() if family in THOROUGH or axes in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for axes in DENSE_LAYOUTS + EXPERT_LAYOUTS * (family in SPARSE)
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return {name: save_tiny_hf(tmp_path_factory.mktemp(name), family=name) for name in FAMILIES}


@pytest.fixture
def moe(sources, tmp_path) -> Path:
    """A Qwen3-MoE folder to damage."""
    return Path(shutil.copytree(sources["qwen3_moe"], tmp_path / "hf"))


@pytest.fixture
def megatron(sources, tmp_path) -> Path:
    """The same as a checkpoint of eight ranks."""
    return to_megatron(sources["qwen3_moe"], tmp_path / "megatron", ParallelLayout(tp=2, pp=2, dp=2, ep=4))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change) -> None:
    held = tensors(folder)
    change(held)
    save_file({name: x.contiguous() for name, x in held.items()}, folder / "model.safetensors")


def differences(a: Path, b: Path) -> dict[str, str]:
    return dict(compare(open_weights(a), open_weights(b)))


@pytest.mark.parametrize(("family", "axes"), CASES, ids=lambda x: x if isinstance(x, str) else str(ParallelLayout(**x)))
def test_there_and_back(family, axes, sources, tmp_path):
    layout = ParallelLayout(**axes)
    there = to_megatron(sources[family], tmp_path / "megatron", layout)
    back = to_hf(there, tmp_path / "hf")
    before, after = tensors(sources[family]), tensors(back)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype and torch.equal(x, after[name]), name
    assert not differences(sources[family], there)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_result(family, sources, tmp_path):
    there = to_megatron(sources[family], tmp_path / "megatron", ParallelLayout(tp=2, pp=2))
    back = to_hf(there, tmp_path / "hf")
    ids = torch.arange(64)[None] % 97
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(p, dtype="float32")(ids).logits for p in (sources[family], back))
    assert a.std() > 0.1 and (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("axes", [dict(dp=8, ep=8), dict(tp=4, pp=2, vpp=2, etp=4), dict(pp=4)])
def test_resharding(axes, megatron, tmp_path, sources):
    other = to_megatron(megatron, tmp_path / "other", ParallelLayout(**axes))
    files = {path.name for path in other.glob("*.distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(ParallelLayout(**axes).world_size)}
    assert not differences(megatron, other) and not differences(other, sources["qwen3_moe"])


def test_tied_embeddings(tmp_path):
    tied = save_tiny_hf(tmp_path / "tied", tie_word_embeddings=True)
    there = to_megatron(tied, tmp_path / "megatron", ParallelLayout(tp=2, pp=2))
    assert not differences(tied, there)
    assert "lm_head.weight" not in open_weights(there).specs


def test_dtype_on_request(sources, tmp_path):
    """The router's bias keeps its own; a tensor of another dtype than the rest does where it is not asked for one."""
    source, bias = sources["deepseek_v3"], "model.layers.1.mlp.gate.e_score_correction_bias"
    narrow = to_hf(to_megatron(source, tmp_path / "m", ParallelLayout(tp=2), torch.bfloat16), tmp_path / "narrow")
    for name, x in tensors(source).items():
        dtype = torch.float32 if "e_score" in name else torch.bfloat16
        assert tensors(narrow)[name].dtype == dtype and torch.equal(tensors(narrow)[name], x.to(dtype)), name
    found = differences(source, narrow)
    assert bias not in found and len(found) == len(tensors(source)) - 3
    assert set(found.values()) == {"is torch.float32 and torch.bfloat16, the values are the same when rounded"}

    rewrite(narrow, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    mixed = to_hf(to_megatron(narrow, tmp_path / "m2", ParallelLayout(pp=2)), tmp_path / "mixed")
    assert tensors(mixed)["model.norm.weight"].dtype is torch.float32 and not differences(narrow, mixed)


# ---------------------------------------------------------------- what is broken is named

EXPERT = "model.layers.2.mlp.experts.{}.down_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def converts_with(folder: Path, tmp_path: Path, message: str, to=to_hf, *arguments) -> None:
    with pytest.raises(ValueError, match=message):
        to(folder, tmp_path / "out", *arguments)
    assert not list(tmp_path.glob("out*"))


def test_swapped_experts(moe, megatron):
    a, b = EXPERT.format(3), EXPERT.format(5)
    rewrite(moe, lambda t: t.update({a: t[b], b: t[a]}))
    found = differences(megatron, moe)
    assert found.keys() == {a, b}
    assert found[a].startswith("differs in 3072 of 3072 values") and found[a].endswith(f"holds the values of {b!r}")


def test_one_bit(moe, megatron):
    def flip(held):
        held[Q].view(torch.int32)[7, 5] ^= 1

    rewrite(moe, flip)
    found = differences(megatron, moe)
    assert found.keys() == {Q} and "differs in 1 of 8192 values" in found[Q] and "first at (7, 5)" in found[Q]


def test_negative_zero_is_another_bit(moe, tmp_path):
    rewrite(moe, lambda t: t[Q].zero_())
    other = Path(shutil.copytree(moe, tmp_path / "other"))
    rewrite(other, lambda t: t[Q].mul_(-1))
    assert differences(moe, other).keys() == {Q}


def test_missing_layer(moe, megatron, tmp_path):
    rewrite(moe, lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name])
    norm = "model.layers.3.input_layernorm.weight"
    converts_with(moe, tmp_path, rf"'{norm}' is missing.* and \d+ more", to_megatron, ParallelLayout())
    found = differences(megatron, moe)
    assert all(".layers.3." in name for name in found) and len(found) == 33 and "is missing" in found[norm]


def test_missing_layer_of_a_checkpoint(megatron, tmp_path):
    """One whose config.json has a layer more."""
    config = megatron / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    converts_with(megatron, tmp_path, r"'model.layers.4.input_layernorm.weight' is missing")


def test_transposed_projection(moe, megatron, tmp_path):
    rewrite(moe, lambda t: t.update({Q: t[Q].T}))
    converts_with(
        moe, tmp_path, rf"'{Q}'.*has shape \(64, 128\), the model needs \(128, 64\)", to_megatron, ParallelLayout()
    )


def test_transposed_square_projection(sources, tmp_path):
    square = "model.layers.0.self_attn.q_proj.weight"
    folder = Path(shutil.copytree(sources["mixtral"], tmp_path / "hf"))
    rewrite(folder, lambda t: t.update({square: t[square].T}))
    assert differences(sources["mixtral"], folder) == {square: "is transposed"}


def test_truncated_safetensors(moe, megatron, tmp_path):
    file = moe / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    converts_with(
        moe, tmp_path, r"not a complete safetensors file.*cut off: 'model.norm.weight'", to_megatron, ParallelLayout()
    )


def test_truncated_checkpoint(megatron, tmp_path):
    file = megatron / "__5_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    converts_with(megatron, tmp_path, r"'lm_head.weight' is cut off: '__5_0.distcp' ends before \(49, 0\)")
    file.unlink()
    converts_with(megatron, tmp_path, r"is cut off: '__5_0.distcp'")


def test_broken_index(megatron, tmp_path):
    (megatron / ".metadata").write_bytes(b"nothing")
    converts_with(megatron, tmp_path, r"metadata' is no index of a torch_dist checkpoint")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_wrong_dtype(dtype, moe, tmp_path):
    rewrite(moe, lambda t: t.update({Q: t[Q].to(dtype)}))
    converts_with(moe, tmp_path, rf"'{Q}'.* is {dtype}, which a cast would corrupt", to_megatron, ParallelLayout())


def test_two_dtypes_in_one_parameter(moe, tmp_path):
    rewrite(moe, lambda t: t.update({Q: t[Q].half()}))
    converts_with(
        moe,
        tmp_path,
        rf"{Q} is torch.float16, .*k_proj.weight is torch.float32.*--dtype",
        to_megatron,
        ParallelLayout(),
    )


def test_unknown_tensor(moe, megatron, tmp_path, sources):
    extra = "model.layers.0.mlp.shared_expert.up_proj.weight"
    rewrite(moe, lambda t: t.update({extra: torch.zeros(1)}))
    converts_with(moe, tmp_path, rf"'{extra}' is in no row of the model's table", to_megatron, ParallelLayout())
    assert differences(megatron, moe).keys() == {extra}
    shutil.copyfile(sources["qwen3"] / "config.json", megatron / "config.json")  # the dense model's
    converts_with(megatron, tmp_path, r"mlp.gate_proj.weight' is missing")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_not_finite(value, moe, megatron, tmp_path):
    rewrite(moe, lambda t: t[Q][3, :2].fill_(value))
    message = rf"'{Q}' has 2 values that are NaN or infinite"
    converts_with(moe, tmp_path, message, to_megatron, ParallelLayout())
    converts_with(moe, tmp_path, message)
    assert "has 2 values that are NaN or infinite" in " ".join(
        what for name, what in compare(open_weights(moe), open_weights(moe)) if name == Q
    )
    target = next(shard for shards in open_weights(megatron).read([Q]) for shard in shards)
    with pytest.raises(ValueError, match=message):
        load_weights(moe, [target])


def test_what_is_there_is_not_replaced(moe, megatron, tmp_path):
    before = {p.name: p.read_bytes() for p in megatron.iterdir()}
    for convert, rest in ((to_hf, ()), (to_megatron, (ParallelLayout(),))):
        with pytest.raises(ValueError, match="exists and is not empty"):
            convert(moe, megatron, *rest)
    assert {p.name: p.read_bytes() for p in megatron.iterdir()} == before


def test_layouts_that_do_not_fit(moe, tmp_path):
    for axes, field in (
        (dict(tp=3), "num_attention_heads=4"),
        (dict(dp=16, ep=16), "num_experts=8"),
        (dict(pp=5), "pp"),
    ):
        converts_with(moe, tmp_path, field, to_megatron, ParallelLayout(**axes))
