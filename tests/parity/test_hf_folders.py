"""HF folders as transformers writes and reads them, and every way such a folder can be broken."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mcore_rl.weights.hf_read import INDEX, check_hf, hf_files, load_hf
from mcore_rl.weights.hf_write import save_hf
from mcore_rl.weights.shards import hf_shapes, hf_shards


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def empty_like_model(config, dtype=torch.float32):
    tensors = {n: torch.full(s.shape, float("nan"), dtype=dtype) for n, s in hf_shapes(config).items()}
    return tensors, hf_shards(config, tensors)


@pytest.fixture(params=["tiny_moe_dir", "tiny_dense_dir", "tiny_tied_dir"])
def source(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def broken(tiny_moe_dir, tmp_path) -> Path:
    """A copy of the model folder to damage."""
    return Path(shutil.copytree(tiny_moe_dir, tmp_path / "broken"))


def test_table_lists_exactly_what_transformers_writes(source):
    written = {name: tuple(x.shape) for name, x in read_folder(source).items()}
    assert {name: spec.shape for name, spec in hf_shapes(AutoConfig.from_pretrained(source)).items()} == written
    check_hf(source, AutoConfig.from_pretrained(source))


def test_load_then_save_is_bit_equal_and_transformers_reads_it(source, tmp_path):
    config, original = AutoConfig.from_pretrained(source), read_folder(source)
    tensors, shards = empty_like_model(config)
    load_hf(source, shards)
    assert all(torch.equal(tensors[name], x) for name, x in original.items())
    source = Path(shutil.copytree(source, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out = save_hf(tmp_path / "out", config, source, tensors.items())
    assert all(torch.equal(x, original[name]) for name, x in read_folder(out).items())
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(p, dtype="float32")(ids).logits for p in (source, out))
    assert torch.equal(before, after)


def test_several_files_with_an_index(tiny_moe_dir, tmp_path):
    config, original = AutoConfig.from_pretrained(tiny_moe_dir), read_folder(tiny_moe_dir)
    shuffled = sorted(original.items(), key=lambda item: item[0][::-1])  # the order of arrival does not matter
    out = save_hf(tmp_path / "out", config, tiny_moe_dir, shuffled, max_shard_bytes=400_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 420_000 for file in files)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * x.numel() for x in original.values())
    tensors, shards = empty_like_model(config)
    load_hf(out, shards)
    assert all(torch.equal(tensors[name], x) for name, x in original.items())
    state = AutoModelForCausalLM.from_pretrained(out, dtype="float32").state_dict()
    assert torch.equal(state["model.norm.weight"], original["model.norm.weight"])
    assert torch.equal(
        state["model.layers.3.mlp.experts.down_proj"][5], original["model.layers.3.mlp.experts.5.down_proj.weight"]
    )


def test_cast_on_load_and_on_save(tiny_dense_dir, tmp_path):
    config, original = AutoConfig.from_pretrained(tiny_dense_dir), read_folder(tiny_dense_dir)
    out = save_hf(tmp_path / "out", config, tiny_dense_dir, original.items(), dtype=torch.bfloat16)
    assert AutoConfig.from_pretrained(out).dtype is torch.bfloat16
    tensors, shards = empty_like_model(config)
    load_hf(out, shards)
    assert all(torch.equal(tensors[name], x.bfloat16().float()) for name, x in original.items())


def test_a_model_folder_is_replaced_and_anything_else_is_not(tiny_dense_dir, tmp_path):
    config, original = AutoConfig.from_pretrained(tiny_dense_dir), read_folder(tiny_dense_dir)
    out = save_hf(tmp_path / "out", config, tiny_dense_dir, original.items())
    save_hf(out, config, tiny_dense_dir, [(name, x + 1) for name, x in original.items()])
    assert torch.equal(read_folder(out)["model.norm.weight"], original["model.norm.weight"] + 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="mine.*is not a model folder"):
        save_hf(tmp_path / "mine", config, tiny_dense_dir, original.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t[:-1], r"not written: 'lm_head.weight'"),
        (lambda t: [*t, ("extra", t[0][1])], r"'extra' is not part of the model"),
        (lambda t: [*t, t[0]], r"'.*' is written twice"),
        (
            lambda t: [(t[0][0], t[0][1].T), *t[1:]],
            r"embed_tokens.weight' has shape \(64, 97\).*needs \(97, 64\)",
        ),
    ],
)
def test_a_failed_save_leaves_the_old_folder(damage, message, tiny_dense_dir, tmp_path):
    config, original = AutoConfig.from_pretrained(tiny_dense_dir), read_folder(tiny_dense_dir)
    in_order = [(name, original[name]) for name in hf_shapes(config)]
    out = save_hf(tmp_path / "out", config, tiny_dense_dir, in_order)
    with pytest.raises(ValueError, match=message):
        save_hf(out, config, tiny_dense_dir, damage(in_order))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(read_folder(out)["lm_head.weight"], original["lm_head.weight"])


def test_full_disk_names_path_and_bytes(tiny_dense_dir, tmp_path, monkeypatch):
    config, original = AutoConfig.from_pretrained(tiny_dense_dir), read_folder(tiny_dense_dir)
    needed = sum(4 * x.numel() for x in original.values())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        with pytest.raises(ValueError, match=rf"disk full: '.*out' needs {needed} bytes and 5 are free"):
            save_hf(tmp_path / "out", config, tiny_dense_dir, original.items())

    def fills_up():
        yield from list(original.items())[:3]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        ValueError, match=rf"'.*out': No space left on device \(the weights need {needed} bytes, \d+ are"
    ):
        save_hf(tmp_path / "out", config, tiny_dense_dir, fills_up())
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, change) -> None:
    tensors = read_folder(folder)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")


def check_both(folder: Path, message: str) -> None:
    """Reading the headers and loading both notice."""
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        check_hf(folder, config)
    with pytest.raises(ValueError, match=message):
        load_hf(folder, empty_like_model(config)[1])


EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"


def test_missing_folder_and_files(broken, tmp_path):
    with pytest.raises(ValueError, match="model folder '.*nowhere' does not exist"):
        hf_files(tmp_path / "nowhere")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        hf_files(broken)


def test_missing_tensor(broken):
    rewrite(broken, lambda t: t.pop(EXPERT))
    check_both(broken, rf"broken' lacks tensors the model needs: '{EXPERT}'\.")


def test_missing_layer_lists_some_of_its_tensors(broken):
    rewrite(broken, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.3.")])
    check_both(broken, r"lacks tensors the model needs: 'model.layers.3.input_layernorm.weight'.* and \d+ more")


def test_transposed_projection(broken):
    rewrite(broken, lambda t: t.update({EXPERT: t[EXPERT].T}))
    check_both(broken, rf"'{EXPERT}'.* has shape \(48, 64\), the model needs \(64, 48\)")


def test_unknown_tensor(broken):
    rewrite(broken, lambda t: t.update({"model.layers.0.mlp.shared_expert.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match="'model.layers.0.mlp.shared_expert.weight'; they would be dropped"):
        check_hf(broken, AutoConfig.from_pretrained(broken))


def test_second_name_of_a_tied_embedding_is_accepted(tiny_tied_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_tied_dir, tmp_path / "both"))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check_hf(folder, AutoConfig.from_pretrained(folder))


def test_truncated_file(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_both(broken, "model.safetensors' is not a complete safetensors file")


def test_integer_tensor(broken):
    rewrite(broken, lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}))
    check_both(broken, rf"'{EXPERT}'.*is torch.int8, which a cast would corrupt")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{not json", "index '.*' is corrupt: JSONDecodeError"),
        ('{"metadata": {}}', "index '.*' is corrupt: KeyError: 'weight_map'"),
        ('{"weight_map": ["a"]}', "index '.*' is corrupt: AttributeError"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "names files that do not exist: 'model-1.safetensors'"),
    ],
)
def test_corrupt_index(index, message, broken):
    (broken / INDEX).write_text(index)
    check_both(broken, message)


def test_index_that_points_at_the_wrong_file(broken):
    names = read_folder(broken)
    save_file({"other": torch.zeros(1)}, broken / "other.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {EXPERT: "other.safetensors"}
    (broken / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    check_both(broken, rf"'{EXPERT}' in '.*other.safetensors', but the file does not hold it")
