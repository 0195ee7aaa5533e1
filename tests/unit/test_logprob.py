"""Chunked log-probs and entropies against torch.log_softmax in fp64."""

import pytest
import torch

from mcore_rl.functional.logprob import token_logprobs


def reference(hidden, weight, targets, vocab_size, temperature):
    log_p = torch.log_softmax(hidden @ weight[:vocab_size].T / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab_size", [11, 9])
def test_values_and_gradients(chunk, temperature, vocab_size):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab_size, (7,))
    a, b = torch.randn(2, 7, dtype=torch.float64)

    got = token_logprobs(hidden, weight, targets, vocab_size=vocab_size, temperature=temperature, chunk_tokens=chunk)
    want = reference(hidden, weight, targets, vocab_size, temperature)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-13)

    grads = torch.autograd.grad((a * got[0] + b * got[1]).sum(), (hidden, weight))
    expected = torch.autograd.grad((a * want[0] + b * want[1]).sum(), (hidden, weight))
    for g, e in zip(grads, expected):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-13)


def test_only_one_output_used():
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, vocab_size=6)[0], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, vocab_size=6)[1], (hidden, weight))


def test_hand_computed():
    # logits (ln 2, ln 3, ln 5): probabilities .2, .3, .5
    hidden = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64).log()
    logprob, entropy = token_logprobs(hidden, torch.eye(3, dtype=torch.float64), torch.tensor([1]), vocab_size=3)
    assert logprob.exp().item() == pytest.approx(0.3, rel=1e-14)
    assert entropy.item() == pytest.approx(1.0296530140645737, rel=1e-14)


def test_no_positions_still_has_a_graph():
    hidden = torch.randn(0, 3, requires_grad=True)
    weight = torch.randn(6, 3, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), vocab_size=6)
    logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_half_precision_hidden_gives_float32():
    hidden, weight = torch.randn(2, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert token_logprobs(hidden, weight, torch.tensor([0, 1]), vocab_size=5)[0].dtype == torch.float32
