"""The output head of a model with tied embeddings follows its weights; without the patch it keeps a packed copy."""

import pytest
import torch


@pytest.fixture
def method(rollout_engine):
    """vLLM's class, patched in this process because an engine runs in it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return UnquantizedEmbeddingMethod


def head_after_an_update(method) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the head computes, what it should) once the shared weight was loaded again in place."""
    torch.manual_seed(0)
    embedding, head = torch.nn.Module(), torch.nn.Module()
    embedding.weight = torch.nn.Parameter(torch.randn(64, 32), requires_grad=False)
    layer = method().tie_weights(head, embedding)
    method().process_weights_after_loading(layer)
    embedding.weight.data.copy_(torch.randn(64, 32))
    x = torch.randn(5, 32)
    return method().apply(layer, x), x @ embedding.weight.T


def test_with_the_patch(method):
    got, want = head_after_an_update(method)
    torch.testing.assert_close(got, want)


def test_without_the_patch(method, monkeypatch):
    for name in ("tie_weights", "process_weights_after_loading"):
        monkeypatch.setattr(method, name, getattr(method, name).__wrapped__)
    got, want = head_after_an_update(method)
    assert (got - want).abs().max() > 1
