"""Which modules a decoder layer is made of, with TransformerEngine and without."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor
from transformers import PretrainedConfig

from mcore_rl.model.layers import GroupedColumnLinear, GroupedRowLinear, RMSNorm, SdpaAttention


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over all heads of a token, with a weight for each of their elements (OLMoE): heads and weight are split
    over tensor ranks, the mean square is of all of them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, num_heads: int) -> None:
        super().__init__()
        self.eps, self.width = eps, num_heads * hidden_size
        shape = (divide(num_heads, config.tensor_model_parallel_size), hidden_size)
        self.weight = torch.nn.Parameter(torch.ones(shape[0] * shape[1], dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h, d] -> [..., h, d], h heads of this rank."""
        squares = x.float().square().sum((-2, -1), keepdim=True)
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normalised = x.float() * torch.rsqrt(squares / self.width + self.eps)
        return self.weight.view(x.shape[-2:]) * normalised.to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def block_spec(
    config: TransformerConfig, hf_config: PretrainedConfig, use_te: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's model chunk `vp_stage`."""
    if use_te:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        layers, norm = block.layer_specs, block.layer_norm
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        sparse = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
        sparse = sparse[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
        specs = {moe: local_layer_spec(config, bool(moe)) for moe in set(sparse)}
        layers, norm = [specs[moe] for moe in sparse], RMSNorm
    layers = [_with_special_attention(layer, config, hf_config) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def local_layer_spec(config: TransformerConfig, moe: bool) -> ModuleSpec:
    """One decoder layer without TransformerEngine."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = MLPSubmodules(linear_fc1=GroupedColumnLinear, linear_fc2=GroupedRowLinear)
    attention, fused_norms = _local_latent_attention() if config.multi_latent_attention else _local_attention(config)
    if moe:
        shared = ModuleSpec(SharedExpertMLP, submodules=linears) if config.moe_shared_expert_intermediate_size else None
        routed = ModuleSpec(TEGroupedMLP, submodules=experts)
        mlp = ModuleSpec(MoELayer, submodules=MoESubmodules(experts=routed, shared_experts=shared))
    else:
        mlp = ModuleSpec(MLP, submodules=linears)
        fused_norms["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=fused_norms,
        ),
    )


def _local_attention(config: TransformerConfig) -> tuple[ModuleSpec, dict[str, str]]:
    """The module, and the norms that TransformerEngine fuses into a linear: checkpoints keep its names."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=SdpaAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    module = ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)
    return module, {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _local_latent_attention() -> tuple[ModuleSpec, dict[str, str]]:
    """Multi-latent attention; the down projections are whole on every rank, as in TransformerEngine's spec."""
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=Linear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=Linear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=SdpaAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm,
        kv_layernorm=RMSNorm,
    )
    module = ModuleSpec(MLASelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)
    return module, {
        f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")
    }


def _with_special_attention(layer: ModuleSpec, config: TransformerConfig, hf_config: PretrainedConfig) -> ModuleSpec:
    """What TransformerConfig has no field for: a bias of the output projection alone, OLMoE's norms."""
    layer = copy.deepcopy(layer)
    attention = layer.submodules.self_attention.submodules
    if getattr(hf_config, "attention_bias", False):
        attention.linear_proj = _biased(attention.linear_proj)
    if hf_config.model_type == "olmoe":
        heads = {"q_layernorm": config.num_attention_heads, "k_layernorm": config.num_query_groups}
        for name, num_heads in heads.items():
            setattr(attention, name, ModuleSpec(AllHeadsRMSNorm, params={"num_heads": num_heads}))
    return layer


def _biased(linear: type) -> type:
    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return Biased
