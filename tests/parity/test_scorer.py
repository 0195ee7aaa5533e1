"""Score heads: a classifier under Megatron gives transformers' scores; a critic starts from a policy's folder."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from mcore_rl.config import ModelConfig
from mcore_rl.data.scores import batch_of
from mcore_rl.data.sequences import Sample
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Scorer, forward_only
from mcore_rl.model.heads import as_scorer
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards


@pytest.fixture(scope="module")
def groups():
    yield process_groups.init(ParallelLayout(), timeout_s=60, seed=0)
    process_groups.destroy()


def sequences():
    rng = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 97, (n,), generator=rng).tolist()) for n in (9, 4, 13)]


def test_scores_equal_transformers(tiny_moe_dir, tmp_path, groups):
    torch.manual_seed(3)
    reference = AutoModelForSequenceClassification.from_pretrained(tiny_moe_dir, num_labels=1, dtype=torch.float32)
    reference.config.pad_token_id = 0
    reference.save_pretrained(tmp_path)
    hf_config = read_hf_config(tmp_path)
    chunks = build_model(hf_config, ModelConfig(path=str(tmp_path)), groups)
    load_hf(tmp_path, megatron_shards(chunks, hf_config, groups))
    batch = batch_of([Sample(t, 1, 0.0, (0.0,)) for t in sequences()], [0.0] * 3)
    (out,) = forward_only(Scorer(chunks, groups), [batch])
    hidden = [reference.model(torch.tensor([t[:-1]])).last_hidden_state[0] for t in sequences()]
    want = torch.cat([reference.score(h)[:, 0] for h in hidden])
    torch.testing.assert_close(out.values, want, rtol=0, atol=1e-5)
    assert want.abs().max() > 1e-2


def test_a_tied_classifier_shares_nothing_with_its_head(tiny_tied_dir, tmp_path, groups):
    """Megatron would add up the gradients of embedding and head over the first and last stage of a pipeline."""
    reference = AutoModelForSequenceClassification.from_pretrained(tiny_tied_dir, num_labels=1, dtype=torch.float32)
    reference.save_pretrained(tmp_path)
    hf_config = read_hf_config(tmp_path)
    assert hf_config.tie_word_embeddings
    (chunk,) = build_model(hf_config, ModelConfig(path=str(tmp_path)), groups)
    assert not chunk.share_embeddings_and_output_weights


def test_critic_from_a_policy_starts_at_zero(tiny_moe_dir, groups):
    hf_config = as_scorer(read_hf_config(tiny_moe_dir))
    chunks = build_model(hf_config, ModelConfig(path=str(tiny_moe_dir)), groups)
    shards = megatron_shards(chunks, hf_config, groups)
    load_hf(tiny_moe_dir, [s for s in shards if s.hf_name != "score.weight"])
    batch = batch_of([Sample(t, 1, 0.0, (0.0,)) for t in sequences()], [0.0] * 3)
    (out,) = forward_only(Scorer(chunks, groups), [batch])
    assert torch.equal(out.values, torch.zeros_like(out.values))
    assert not any(p.isnan().any() for p in chunks[0].parameters())
