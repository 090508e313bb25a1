"""Routing of tokens to experts in the reference model (:mod:`reference`).

Source: megatron/core/transformer/moe/moe_utils.py, ``topk_routing_with_score_function``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Routing:
    """How scores are computed, from the arguments of the run."""

    chosen: int
    """Number of experts per token."""
    sigmoid: bool
    softmax_first: bool
    factor: float


def routing_of(args: dict[str, Any]) -> Routing:
    """Return the routing of a run's arguments.

    Raises:
        UserError: the reference model does not support it.
    """
    if args.get("num_experts"):
        refused = ("moe_router_num_groups", "moe_expert_capacity_factor")
        names = [name for name in refused if args.get(name)]
        if args.get("moe_router_load_balancing_type") == "sinkhorn":
            names.append("moe_router_load_balancing_type sinkhorn")
        if names:
            raise UserError(f"--verify: not supported for models with {', '.join(names)}")
    return Routing(
        args.get("moe_router_topk") or 2,
        args.get("moe_router_score_function") == "sigmoid",
        bool(args.get("moe_router_pre_softmax")),
        args.get("moe_router_topk_scaling_factor") or 1.0,
    )


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """Return the weight of each expert, ``[..., experts]``; 0 if it is not chosen.

    Args:
        logits: ``[..., experts]``.
        bias: ``[experts]``, added for the choice only.
        routing: how scores are computed.
    """
    if routing.sigmoid:
        scores = logits.sigmoid()
        chosen = (scores if bias is None else scores + bias).topk(routing.chosen, -1).indices
        weights = scores.gather(-1, chosen)
        if routing.chosen > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif routing.softmax_first:
        weights, chosen = logits.softmax(-1).topk(routing.chosen, -1)
    else:
        values, chosen = logits.topk(routing.chosen, -1)
        weights = values.softmax(-1)
    return torch.zeros_like(logits).scatter(-1, chosen, weights * routing.factor)
