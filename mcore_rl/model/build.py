"""HF config -> TransformerConfig -> this rank's chunks of the policy."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from mcore_rl.config import ModelConfig
from mcore_rl.model.families import FAMILIES, find_family, rope_arguments
from mcore_rl.model.heads import PolicyModel, ScoreModel
from mcore_rl.model.specs import block_spec
from mcore_rl.parallel.device import has_transformer_engine
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.families import is_scorer
from mcore_rl.weights.shards import pipeline_layers


def read_hf_config(path: str | Path, key: str = "model.path") -> PretrainedConfig:
    """Read config.json of a HF folder; `key` of the configuration named it.

    Raises:
        ValueError: no such folder, no readable config.json, or an architecture without an entry in FAMILIES.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        what = "has no config.json" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{key}={str(path)!r} {what}; pass a Hugging Face folder (config.json, safetensors)")
    try:
        architectures = json.loads(file.read_text()).get("architectures") or []
        if find_family(architectures) is None:
            raise ValueError(f"architectures={architectures} is not supported; supported: {', '.join(FAMILIES)}")
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def transformer_config(
    hf_config: PretrainedConfig, model: ModelConfig, layout: ParallelLayout, use_te: bool = False
) -> TransformerConfig:
    """Megatron's configuration of this model under this layout.

    Args:
        use_te: for TransformerEngine's modules.

    Raises:
        ValueError: an unsupported architecture or feature (none is ignored), or a layout that does not divide it.
    """
    family = find_family(hf_config.architectures or [])
    if family is None:
        raise ValueError(f"architectures={hf_config.architectures} is not supported; supported: {', '.join(FAMILIES)}")
    layout.validate_model(hf_config)
    dtype = getattr(torch, model.dtype)
    settings = dict(
        **layout.megatron_sizes,
        sequence_parallel=layout.tp > 1,
        # Packed micro-batches differ in length: in time between pipeline stages, and between data-parallel ranks, which
        # only this dispatcher allows. Megatron wants it named for dense models too.
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=torch.cuda.is_available(),  # gloo has no batched send and receive
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        cuda_graph_scope=[],  # the default value is a deprecated one
        # All weights come from files, but initialisation also marks the split ones, by which clipping counts them.
        perform_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        # Fused kernels of apex and TransformerEngine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_recompute(model),
        **family(hf_config, model.moe_aux_loss_coef),
    )
    settings["moe_grouped_gemm"] = use_te and "num_moe_experts" in settings
    if hf_config.num_hidden_layers % (layout.pp * layout.vpp):
        settings["pipeline_model_parallel_layout"] = _uneven_pipeline(hf_config.num_hidden_layers, layout)
    make = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    with warnings.catch_warnings():
        # Asked for by model.recompute=selective; Megatron wonders whether it is useful with TransformerEngine.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer impl")
        return make(**settings)


def build_model(hf_config: PretrainedConfig, model: ModelConfig, groups: Groups) -> list[PolicyModel]:
    """This rank's chunks, one a virtual pipeline stage, on `groups.device`; weights are to be filled from files.

    Parameters are created in `model.dtype` and inputs are integers, so no Float16Module is needed around them: they go
    straight into Megatron's DistributedDataParallel. Rows that pad the vocabulary to a multiple of tp are zero. The
    configuration of a sequence classifier gives ScoreModels (see `heads.as_scorer`).
    """
    make = partial(ScoreModel, num_labels=hf_config.num_labels) if is_scorer(hf_config) else PolicyModel
    use_te = _use_transformer_engine(model)
    config = transformer_config(hf_config, model, groups.layout, use_te)
    vpp, pp, at = groups.layout.vpp, groups.layout.pp, groups.coords.pp
    chunks = []
    for stage in range(vpp):
        vp_stage = stage if vpp > 1 else None
        chunk = make(
            config,
            block_spec(config, hf_config, use_te, vp_stage),
            vocab_size=padded_vocab_size(hf_config, groups.layout),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=at == 0 and stage == 0,
            post_process=at == pp - 1 and stage == vpp - 1,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings and not is_scorer(hf_config),
            position_embedding_type="rope",
            vp_stage=vp_stage,
            **rope_arguments(hf_config),
        )
        for name, weight in chunk.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                weight.data.zero_()
        chunks.append(chunk.to(groups.device))
    return chunks


def padded_vocab_size(hf_config: PretrainedConfig, layout: ParallelLayout) -> int:
    """Rows of the vocabulary matrices: the smallest multiple of tp that holds the vocabulary."""
    return -(-hf_config.vocab_size // layout.tp) * layout.tp


def _uneven_pipeline(num_layers: int, layout: ParallelLayout) -> list[list[str]]:
    """What every pipeline chunk holds, in Megatron's words, where its equal division does not apply."""
    of_rank = [pipeline_layers(num_layers, layout, pp) for pp in range(layout.pp)]
    chunks = [["decoder"] * len(of_rank[pp][stage]) for stage in range(layout.vpp) for pp in range(layout.pp)]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def _recompute(model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _use_transformer_engine(model: ModelConfig) -> bool:
    if model.spec == "transformer_engine" and not has_transformer_engine():
        raise ValueError(
            "model.spec=transformer_engine needs CUDA and TransformerEngine, and one of them is missing; install "
            "transformer-engine or set model.spec=auto"
        )
    return model.spec != "local" and has_transformer_engine()
