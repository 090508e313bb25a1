"""Mixture of experts: megatron-core's settings, and which layers of a chunk have experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_llmjp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_llmjp.model.kernels import KernelChoice
from megatron_llmjp.patches.experts_on_cpu import support_experts_on_cpu

_PERMUTATION = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)
_ROUTER = (
    "fused_topk_with_score_function",
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
)


def expert_settings(config: Config, kernels: KernelChoice) -> dict[str, Any]:
    """Return the fields of megatron-core's ``TransformerConfig`` for experts; none if dense."""
    model, parallel = config.model, config.parallel
    if not model.has_experts:
        return {}
    support_experts_on_cpu()
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_score_function": model.moe_router_score_function,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_num_groups": model.moe_router_num_groups,
        "moe_router_group_topk": model.moe_router_group_topk,
        "moe_router_dtype": model.moe_router_dtype,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": model.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": model.moe_token_drop_policy,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_layer_freq": [int(layer) for layer in model.expert_layers],
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "moe_grouped_gemm": _multiplies_together(parallel, kernels),
        "moe_permute_fusion": parallel.moe_permute_fusion and _fused(_PERMUTATION, kernels),
        "moe_router_fusion": parallel.moe_router_fusion and _fused(_ROUTER, kernels),
    }


def recomputed_modules(parallel: ParallelConfig, kernels: KernelChoice) -> list[str]:
    """Return megatron-core's ``recompute_modules``.

    It recomputes the activation functions of experts only if it multiplies experts together.
    """
    without = set() if _multiplies_together(parallel, kernels) else {"moe_act"}
    return [module for module in parallel.recompute_modules if module not in without]


def _fused(names: Sequence[str], kernels: KernelChoice) -> bool:
    """Return whether Transformer Engine is used, and its version has all of these functions."""
    # Without Transformer Engine the module has none of the names; of an older one they are None.
    available = all(getattr(moe_utils, name, None) is not None for name in names)
    return kernels.transformer_engine and available


def _multiplies_together(parallel: ParallelConfig, kernels: KernelChoice) -> bool:
    # Without Transformer Engine, megatron-core's grouped multiplication needs the package
    # grouped_gemm, and GPUs.
    return parallel.moe_grouped_gemm and kernels.transformer_engine


def choose_layers(
    model: ModelConfig,
    core: TransformerConfig,
    vp_stage: int | None,
    make_layer: Callable[[int | None], Any],
    norm: Any,
) -> TransformerBlockSubmodules:
    """Return the layers of a chunk, dense ones and those with experts.

    Args:
        model: the architecture.
        core: megatron-core's configuration of it.
        vp_stage: number of the chunk in the interleaved schedule.
        make_layer: returns the spec of a layer with a number of experts, or of a dense one (None).
        norm: class of the norm behind the last layer of the model.
    """
    layers = get_num_layers_to_build(core, vp_stage=vp_stage)
    first = get_transformer_layer_offset(core, vp_stage=vp_stage) if model.has_experts else 0
    kinds = model.expert_layers[first : first + layers]
    specs = {kind: make_layer(model.num_moe_experts if kind else None) for kind in set(kinds)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)
