"""The output head in fp32 under a bf16 model: log-probs as exact as fp32, gradients in the weight's own type."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mcore_rl.model import forward
from mcore_rl.model.forward import Policy


def test_log_probs_of_bf16_hidden_states_are_not_rounded(monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(6, 1, 64).bfloat16()
    weight = torch.nn.Parameter(torch.randn(50, 64).bfloat16())
    targets = torch.randint(50, (6,))
    batch = SimpleNamespace(loss_mask=torch.ones(6, dtype=torch.bool), targets=targets)
    monkeypatch.setattr(forward, "get_model_config", lambda chunk: SimpleNamespace(sequence_parallel=False))
    monkeypatch.setattr(forward, "copy_to_tensor_model_parallel_region", lambda x: x)
    monkeypatch.setattr(forward, "get_attr_wrapped_model", lambda chunk, name: lambda: weight)
    groups = SimpleNamespace(layout=SimpleNamespace(tp=1))
    exact = weight.detach().double().requires_grad_()
    expected = (hidden[:, 0].double() @ exact.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)

    def worst(fp32_head: bool) -> float:
        policy = Policy([], groups, vocab_size=50, fp32_head=fp32_head)
        logprobs = policy.read(None, batch, hidden).logprobs
        (grad,) = torch.autograd.grad(logprobs.sum(), weight)
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), expected_grad, rtol=0.05, atol=0.05)
        return (logprobs.double() - expected).abs().max().item()

    assert worst(fp32_head=True) < 1e-5 and worst(fp32_head=False) > 1e-3
