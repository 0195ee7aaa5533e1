"""How a model ends: in a vocabulary (policies), or in numbers (critics, reward models, discriminators)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from transformers import PretrainedConfig


class PolicyModel(GPTModel):
    """One pipeline chunk of the policy. Ends in hidden states: logits exist only where log-probs are computed."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Hidden states of causal attention; a chunk after the first takes its input from `set_input_tensor`.

        Args:
            input_ids, position_ids: [b, s] int64; packed: [1, t], with positions that restart in every segment.
            attention_mask: None, always: attention is causal.
            packed_seq_params: `thd` segment bounds.
        Returns:
            [s, b, h], under sequence parallelism this rank's [s/tp, b, h]. Of the last chunk: after the final norm,
            ready for `output_weight`; of others: what the next chunk takes.
        """
        return super().forward(input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """[V/tp, h] output matrix of the last chunk, this rank's rows of the padded vocabulary."""
        assert self.post_process, "only the last pipeline chunk has an output matrix"
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


class ScoreHead(nn.Module):
    """[T, D] hidden states -> [T, labels] float32. Held whole by every tensor rank.

    The name and shape of the weight are those of transformers' sequence-classification models.
    """

    def __init__(self, hidden_size: int, num_labels: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_labels, hidden_size, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float())


class ScoreModel(PolicyModel):
    """A pipeline chunk of a scorer: the last one has a `ScoreHead` in the place of the output matrix."""

    def __init__(self, *args: Any, num_labels: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = ScoreHead(self.config.hidden_size, num_labels, self.config.params_dtype)

    def score(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, labels]."""
        return self.output_layer(hidden)


def as_scorer(hf_config: PretrainedConfig, num_labels: int = 1) -> PretrainedConfig:
    """The same backbone with a score head: the configuration of transformers' ...ForSequenceClassification."""
    config = copy.deepcopy(hf_config)
    config.architectures = [hf_config.architectures[0].replace("ForCausalLM", "ForSequenceClassification")]
    config.num_labels = num_labels
    config.tie_word_embeddings = False
    return config
