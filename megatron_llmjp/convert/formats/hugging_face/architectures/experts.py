"""Mixture of experts in Hugging Face models: requirements, tensors, and keys of ``config.json``."""

from __future__ import annotations

from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import TensorRule
from megatron_llmjp.convert.formats.hugging_face.architectures.llama import LAYER_KEYS
from megatron_llmjp.convert.formats.hugging_face.config import positive_int_field
from megatron_llmjp.convert.tensors import EXPERT, LAYER, ROUTER, gate_up, whole


def expert_requirements(model: ModelConfig) -> dict[str, bool]:
    """Return the requirements of Mixtral and Qwen3-MoE (see ``HuggingFaceArchitecture``)."""
    return {
        "dense models": model.has_experts,
        "shared experts": model.moe_shared_expert_intermediate_size is None,
        f"moe_router_score_function {model.moe_router_score_function}": (
            model.moe_router_score_function == "softmax"
        ),
        f"moe_router_topk_scaling_factor {model.moe_router_topk_scaling_factor}": (
            model.moe_router_topk_scaling_factor in (None, 1.0)
        ),
        "groups of experts": model.moe_router_num_groups is None,
        "moe_router_enable_expert_bias": not model.moe_router_enable_expert_bias,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor is None,
        "moe_router_load_balancing_type sinkhorn": (
            model.moe_router_load_balancing_type != "sinkhorn"
        ),
    }


def expert_rules(block: str, gate: str, up: str, down: str) -> list[TensorRule]:
    """Return the rules of router and experts.

    Args:
        block: name of the module in its layer.
        gate: name of an expert's gate projection; the rows of ``linear_fc1`` up to the half.
        up: name of the projection of its other rows.
        down: name of the projection back, ``linear_fc2``.
    """
    expert = f"{LAYER_KEYS}{block}.experts.{{e}}."
    rows = (f"{expert}{gate}.weight", f"{expert}{up}.weight")
    return [
        TensorRule(LAYER + ROUTER, (f"{LAYER_KEYS}{block}.gate.weight",), whole),
        TensorRule(f"{LAYER}{EXPERT}linear_fc1.weight", rows, gate_up),
        TensorRule(f"{LAYER}{EXPERT}linear_fc2.weight", (f"{expert}{down}.weight",), whole),
    ]


def router_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of the router that both architectures share."""
    return {
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "output_router_logits": False,
    }


def router_fields(config: dict[str, Any], number: str, where: str) -> dict[str, Any]:
    """Return the model fields of experts that both architectures share.

    Args:
        config: the content of config.json, with the defaults of the class.
        number: key of the number of experts.
        where: the file, for messages.

    Raises:
        UserError: a number is not valid.
    """
    return {
        "num_moe_experts": positive_int_field(config, number, where),
        "moe_router_topk": positive_int_field(config, "num_experts_per_tok", where),
        "moe_aux_loss_coeff": config["router_aux_loss_coef"],
    }
