"""Arguments of experts in Megatron-LM checkpoints.

Source: megatron/training/arguments.py (``_add_moe_args``) and TransformerConfig of megatron-core
0.6 to 0.16. While a model has no experts, none of them has an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.config import (
    positive_int_field,
    refuse_unsupported,
)

Fields = Mapping[str, Any]

NUMBER_FIELDS = ("num_experts", "num_moe_experts")
"""The number of experts: the argument, and the field of TransformerConfig."""

EXPERT_FIELDS = frozenset(name for name in ModelConfig.model_fields if name.startswith("moe_"))
"""Fields that are read: those of the model's configuration, which have the same names."""

_TRAINING = """
moe_combine_bwd_dtype moe_deepep_num_sms moe_dispatch_fwd_dtype moe_enable_deepep
moe_enable_routing_replay moe_extended_tp moe_flex_dispatcher_backend
moe_flex_dispatcher_num_sms moe_grouped_gemm moe_hybridep_num_blocks_permute
moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing
moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps moe_layer_recompute
moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_experts_for_cuda_graph_inference
moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_fusion
moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_shared_expert_overlap
moe_token_dispatcher_type moe_token_dropping moe_upcycling_granularity
moe_use_legacy_grouped_gemm moe_use_upcycling
"""

TRAINING_FIELDS = frozenset(_TRAINING.split())
"""Fields of kernels, communication and noise, without effect on the trained model's function."""

_OFF = (None, False, 1, [1], 0)
_LOSSES = "moe_router_load_balancing_type"


def has_experts(given: Fields) -> bool:
    """Return whether arguments describe a model with experts; 0 and 1 mean none."""
    return any(given.get(name) not in _OFF for name in NUMBER_FIELDS)


def is_unknown_expert_field(name: str, value: Any, given: Fields) -> bool:
    """Return whether a field has an effect on a model with experts that is not supported."""
    if not name.startswith("moe_") or not has_experts(given):
        return False
    if name in EXPERT_FIELDS or name in TRAINING_FIELDS:
        return False
    return value is not None and value is not False and value != []


def expert_fields(given: dict[str, Any], where: str, is_core: bool) -> dict[str, Any]:
    """Return the model fields of experts; none for a dense model.

    Args:
        given: the arguments by name.
        where: the file, for messages.
        is_core: whether the run used megatron-core's model.

    Raises:
        UserError: an argument is not valid or not supported.
    """
    if not has_experts(given):
        return {}
    name = next(name for name in NUMBER_FIELDS if given.get(name) not in _OFF)
    number = given[name]
    refuse_unsupported(
        where,
        **{
            f"{name} = {number!r} (a list)": isinstance(number, list | tuple),
            f"{name} {number} in a legacy model (not megatron-core's)": not is_core,
            f"{name} {number} with add_bias_linear": bool(given.get("add_bias_linear", True)),
        },
    )
    found = {key: given[key] for key in EXPERT_FIELDS if given.get(key) is not None}
    found["num_moe_experts"] = positive_int_field(given, name, where)
    if isinstance(layers := found.get("moe_layer_freq"), list):
        found["moe_layer_freq"] = 1 if all(layers) else tuple(layers)
    kinds = found.get(_LOSSES, "aux_loss")
    kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
    refuse_unsupported(
        where, **{f"{_LOSSES} with sinkhorn": len(kinds) > 1 and "sinkhorn" in kinds}
    )
    if len(kinds) != 1 or kinds[0] == "global_aux_loss":  # losses do not change the function
        return {**found, _LOSSES: "none", "moe_aux_loss_coeff": 0.0}
    weights = found.get("moe_aux_loss_coeff", 0.0)
    weight = weights[0] if isinstance(weights, list | tuple) else weights
    return {**found, _LOSSES: kinds[0], "moe_aux_loss_coeff": weight}


def expert_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments that describe the experts of a model."""
    if not model.has_experts:
        return {"num_experts": None}
    layers = [int(layer) for layer in model.expert_layers]
    return {
        "num_experts": model.num_moe_experts,
        **{name: getattr(model, name) for name in EXPERT_FIELDS},
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": 1,
    }
