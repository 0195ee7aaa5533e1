"""The cache of reference log-probs: found by what it is a function of, and only if it is whole."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from mcore_rl.algorithms import load
from mcore_rl.config import parse_config
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.model.build import read_hf_config
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.check_models import check_reference
from mcore_rl.roles.given_logprobs import GivenLogprobs, cache_file, describe, digest_of, digests_of, read, write

ROWS = {bytes([i] * 16): torch.randn(n, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((3, 1, 4))}


def test_log_probs_come_back_where_the_responses_are():
    first, second = Sample((5, 6, 7, 1), 2, 0.0, (0.0, 0.0)), Sample((5, 6, 1), 1, 0.0, (0.0,))
    rows = {digest_of(s.token_ids, s.num_response): torch.tensor(x) for s, x in
            ((first, [-0.1, -0.2]), (second, [-0.3]))}  # fmt: skip
    given = GivenLogprobs(rows)
    for order, want in (((first, second), [-0.1, -0.2, -0.3]), ((second, first), [-0.3, -0.1, -0.2])):
        torch.testing.assert_close(given.of(Sequences.of(order)), torch.tensor(want))
    assert given.of(Sequences.of([])).numel() == 0


def test_the_same_tokens_with_another_boundary_are_another_sequence():
    assert len(set(digests_of(Sequences.of([Sample((5, 6, 7), n) for n in (1, 2)])))) == 2


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "folder" / "x.safetensors"
    assert read(path) is None
    write(path, ROWS, {"data": "d"})
    found = read(path)
    assert found.keys() == ROWS.keys() and all(torch.equal(found[k], ROWS[k]) for k in ROWS)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"], "nothing half written is left"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_told_and_not_used(tmp_path, capsys, damage):
    path = tmp_path / "x.safetensors"
    write(path, ROWS, {})
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the last log-prob
    path.write_bytes({"cut": content[:-5], "flipped": content, "empty": b""}[damage])
    assert read(path) is None
    assert "is damaged" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    write(tmp_path / "file" / "x.safetensors", ROWS, {})
    assert "cannot be kept" in capsys.readouterr().out


def plan_of(model, /, **sections):
    config = parse_config({"name": "x", "model": {"path": str(model)}, "algorithm": {"name": "dpo"}} | sections)
    pairs = [((1, 2), (3,), (4,)), ((1, 5), (6,), (7,))]
    task = SimpleNamespace(train_pairs=lambda: pairs, eval_pairs=lambda n: pairs[:1])
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    return SimpleNamespace(config=config, layout=ParallelLayout(), task=task, tokenizer=tokenizer)


def file_of(plan):
    return cache_file(plan, describe(plan))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "a.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "a.safetensors"])
def test_a_changed_file_of_the_model_misses(model, tmp_path, name):
    found = file_of(plan_of(model))
    copy = shutil.copytree(model, tmp_path / "copy")
    assert file_of(plan_of(copy)) == found, "it is the content that counts, not the place"
    (copy / name).write_text("changed")
    assert file_of(plan_of(copy)) != found


def test_what_else_decides(model):
    """Settings that leave the reference alone hit; those that may change a bit of it, or the data, miss."""
    found = file_of(plan_of(model))
    for same in ({"seed": 7}, {"algorithm": {"name": "dpo", "beta": 0.5}}, {"optimizer": {"lr": 1.0}}, {"name": "y"}):
        assert file_of(plan_of(model, **same)) == found, same
    for other in ({"batch": {"micro_batch_tokens": 64}}, {"model": {"path": str(model), "dtype": "bfloat16"}}):
        assert file_of(plan_of(model, **other)) != found, other
    plan = plan_of(model)
    for changed in (
        {"layout": ParallelLayout(tp=2)},
        {"tokenizer": SimpleNamespace(chat_template="other")},
        {"task": SimpleNamespace(train_pairs=lambda: [((1, 2), (3,), (8,))], eval_pairs=lambda n: [])},
    ):
        assert file_of(SimpleNamespace(**vars(plan) | changed)) != found, changed
    folder = str(model.parent / "elsewhere")
    assert file_of(plan_of(model, reference={"cache_dir": folder})).parent.as_posix() == folder
    assert json.loads(describe(plan)["arithmetic"])["versions"].keys() == {"torch", "megatron-core"}


KL = {"name": "grpo", "kl_coef": 0.1}


@pytest.mark.parametrize(
    ("algorithm", "reference", "message"),
    [
        (KL, {"parallel": {"tp": 3}}, "reference.parallel: 4 ranks cannot hold parallel.tp"),
        (KL, {"parallel": {"ep": 2}}, "reference.parallel: the model does not fit"),
        ({"name": "dpo"}, {"update_every": 5}, "update_every=5 with .*set reference.precompute=false"),
        ({"name": "grpo"}, {"path": "elsewhere"}, "reference.path='elsewhere' is never read"),
    ],
)
def test_what_does_not_fit_is_told_with_its_fix(tiny_dense_dir, algorithm, reference, message):
    config = parse_config({"name": "x", "model": {"path": str(tiny_dense_dir)}, "reference": reference})
    fields = dict(algorithm)
    with pytest.raises(ValueError, match=message):
        check_reference(config, load(fields.pop("name"), **fields), read_hf_config(tiny_dense_dir), world=4)
