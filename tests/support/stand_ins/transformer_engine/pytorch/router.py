"""Functions of layers of experts, which megatron-core imports and a dense model does not call."""

from typing import Any


def fused_compute_score_for_moe_aux_loss(*args: Any) -> Any:
    raise NotImplementedError


def fused_moe_aux_loss(*args: Any) -> Any:
    raise NotImplementedError


def fused_topk_with_score_function(*args: Any) -> Any:
    raise NotImplementedError
