"""Configuration section of the architecture: the dense model, and experts (mixture of experts).

The fields of experts have the names of megatron-core's ``TransformerConfig``.
"""

from __future__ import annotations

import ast
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from megatron_llmjp.config.model_config import DenseModelConfig


class ModelConfig(DenseModelConfig):
    """Architecture. The defaults are those of LLaMA, without sizes."""

    num_moe_experts: PositiveInt | None = Field(
        None, description="number of experts of a mixture-of-experts model; default, and 1: dense"
    )
    moe_layer_freq: PositiveInt | tuple[Literal[0, 1], ...] = Field(
        1,
        description="layers with experts: every Nth layer from the first one, or a list such as "
        "[0]*1+[1]*31, 1 for a layer with experts and 0 for a dense one",
    )
    moe_ffn_hidden_size: PositiveInt | None = Field(
        None, description="hidden size of each expert; default: ffn_hidden_size"
    )
    moe_shared_expert_intermediate_size: PositiveInt | None = Field(
        None, description="hidden size of the shared experts together; default: no shared experts"
    )
    moe_shared_expert_gate: bool = Field(
        False, description="multiply the output of the shared experts by a sigmoid gate (Qwen2-MoE)"
    )
    moe_router_topk: PositiveInt = Field(2, description="number of experts per token")
    moe_router_score_function: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="function that makes scores of the router's logits"
    )
    moe_router_pre_softmax: bool = Field(
        False,
        description="softmax over all experts, before the choice of the top k; default: over the "
        "chosen ones",
    )
    moe_router_topk_scaling_factor: PositiveFloat | None = Field(
        None, description="factor of the scores of the chosen experts; default: 1"
    )
    moe_router_num_groups: PositiveInt | None = Field(
        None, description="number of groups of experts, for routing limited to some of them"
    )
    moe_router_group_topk: PositiveInt | None = Field(
        None, description="number of groups that a token chooses its experts from"
    )
    moe_router_dtype: Literal["fp32", "fp64"] | None = Field(
        None, description="precision of routing; default: that of the activations"
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "sinkhorn", "none"] = Field(
        "aux_loss",
        description="load balancing: a loss over each micro-batch or over each sequence, both with "
        "moe_aux_loss_coeff; Sinkhorn assignment; or none",
    )
    moe_aux_loss_coeff: NonNegativeFloat = Field(
        0.0, description="weight of the load balancing loss; 1e-2 is common"
    )
    moe_z_loss_coeff: PositiveFloat | None = Field(
        None, description="weight of the router's z-loss; 1e-3 is common; default: no z-loss"
    )
    moe_router_enable_expert_bias: bool = Field(
        False,
        description="balance the load by a bias of each expert in the choice of the top k, without "
        "a loss (DeepSeek-V3); requires moe_router_score_function sigmoid",
    )
    moe_router_bias_update_rate: PositiveFloat = Field(
        1e-3, description="change of the experts' biases in each step"
    )
    moe_expert_capacity_factor: PositiveFloat | None = Field(
        None,
        description="drop tokens above this multiple of the mean number of tokens per expert; "
        "default: no token is dropped",
    )
    moe_pad_expert_input_to_capacity: bool = Field(
        False, description="pad the tokens of each expert to its capacity"
    )
    moe_token_drop_policy: Literal["probs", "position"] = Field(
        "probs", description="tokens to drop: those of the lowest scores, or the last ones"
    )

    @property
    def has_experts(self) -> bool:
        """Whether this is a mixture-of-experts model."""
        return self.num_moe_experts is not None

    @property
    def expert_ffn_size(self) -> int:
        """Hidden size of one expert (of each half with SwiGLU)."""
        return self.moe_ffn_hidden_size or self.ffn_size

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts, as in megatron-core's ``get_gpt_decoder_layer_specs``."""
        if not self.has_experts or self.moe_layer_freq == 1:
            return (self.has_experts,) * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return tuple(i % self.moe_layer_freq == 0 for i in range(self.num_layers))
        return tuple(bool(layer) for layer in self.moe_layer_freq)

    def resolved_sizes(self) -> dict[str, int]:
        """Return the fields whose defaults are computed from other sizes, with their values."""
        experts = {"moe_ffn_hidden_size": self.expert_ffn_size} if self.has_experts else {}
        return {**super().resolved_sizes(), **experts}

    @field_validator("num_moe_experts", mode="before")
    @classmethod
    def _one_is_dense(cls, value: Any) -> Any:
        """Treat one expert, Megatron-DeepSpeed's default, as a dense model."""
        return None if value in (1, "1") else value

    @field_validator("moe_layer_freq", mode="before")
    @classmethod
    def _parse_layers(cls, value: Any) -> Any:
        """Parse Megatron-LM's notation of layers."""
        return parse_layer_pattern(value) if isinstance(value, str) and "[" in value else value

    @field_validator("moe_router_load_balancing_type", mode="before")
    @classmethod
    def _refuse_other_losses(cls, value: Any) -> Any:
        if value == "global_aux_loss" or isinstance(value, list | tuple):
            raise ValueError(
                "global_aux_loss and several losses at once are not supported: use one of "
                "aux_loss, seq_aux_loss, sinkhorn, none"
            )
        return value


def parse_layer_pattern(text: str) -> tuple[int, ...]:
    """Parse a list of zeros and ones in Megatron-LM's notation, such as ``([0]*1+[1]*3)*2``.

    Megatron-LM evaluates the text as Python; here it may consist of lists, sums and repetitions.

    Raises:
        ValueError: it has another form.
    """
    try:
        found = _pattern(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        found = None
    if not isinstance(found, tuple) or len(found) > _MAX_LAYERS:
        raise ValueError("expected a number, or a list of 0 and 1 such as [0]*1+[1]*31")
    return found


_MAX_LAYERS = 10_000


def _pattern(node: ast.AST) -> tuple[int, ...] | int | None:
    """Return the value of a part of a pattern; None if it has another form."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= _MAX_LAYERS:
        return node.value
    if isinstance(node, ast.List):
        items = [_pattern(item) for item in node.elts]
        numbers = tuple(item for item in items if isinstance(item, int))
        return numbers if len(numbers) == len(items) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _pattern(node.left), _pattern(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, tuple) and isinstance(right, tuple):
        return left + right
    if isinstance(node.op, ast.Mult) and isinstance(left, tuple) and isinstance(right, int):
        return left * right if len(left) * right <= _MAX_LAYERS else None
    return None
