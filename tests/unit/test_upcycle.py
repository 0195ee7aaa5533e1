"""A dense model made into a mixture of experts: without noise the same model, with noise one whose routes matter."""

import pytest
import torch
from tiny_models import save_tiny_hf
from transformers import AutoModelForCausalLM
from typer import BadParameter

from tools.upcycle import main


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_tiny_hf(tmp_path_factory.mktemp("dense"), family="llama")
    return folder


@torch.no_grad()
def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(2, 50)[None]).logits


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    """The tiny checkpoint has none."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    silent = SimpleNamespace(save_pretrained=lambda folder: None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: silent)


def test_without_noise_it_is_the_dense_model(dense, tmp_path):
    main(dense, tmp_path / "same", experts=4, noise=0.0)
    main(dense, tmp_path / "noisy", experts=4, noise=0.5)
    want = logits(dense)
    assert (logits(tmp_path / "same") - want).abs().max() < 1e-4
    assert (logits(tmp_path / "noisy") - want).abs().max() > 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"same", "noisy"}


def test_bad_arguments(dense, tiny_dense_dir, tmp_path):
    with pytest.raises(BadParameter, match="exists; choose another folder"):
        main(dense, tmp_path)
    with pytest.raises(BadParameter, match="--top-k 5 of --experts 4"):
        main(dense, tmp_path / "x", experts=4, top_k=5)
    with pytest.raises(BadParameter, match="is a qwen3; a Llama is needed"):
        main(tiny_dense_dir, tmp_path / "x")
