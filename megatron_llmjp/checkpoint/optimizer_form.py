"""Loading the state of one kind of optimizer into another, and of one precision into another.

megatron-core's optimizers name the same numbers differently. The fp32 weights that updates are
added to are ``optimizer.state.param.*`` of the distributed optimizer, those of the plain one are
``optimizer.state.fp32_param.*`` in half precision and the model's own weights in fp32; the settings
of the parameter groups are in two places of ``common.pt``. Here a load is pointed at the names that
a checkpoint has, so that a resume may switch the distributed optimizer on or off and change the
precision without losing a bit of the fp32 weights and moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

DISTRIBUTED, PLAIN = "optimizer.state.param.", "optimizer.state.fp32_param."
"""What precedes a weight's name in the name of its fp32 copy."""

_SHARDING = "param_state_sharding_type"
_HALF = (torch.bfloat16, torch.float16)


def point_model(model: Any, stored: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Read the weights of an fp32 model from a half-precision checkpoint's fp32 copies.

    Args:
        model: sharded state of the model; changed in place.
        stored: the checkpoint's tensors by name, without their data.
        dtype: of the model's weights.
    """
    if dtype in _HALF:
        return

    def point(entry: Any) -> Any:
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            found = stored.get(entry.key)
            copies = (f"{prefix}{entry.key}" for prefix in (PLAIN, DISTRIBUTED))
            copy = next((key for key in copies if key in stored), None)
            if copy is not None and getattr(found, "dtype", None) in _HALF:
                entry.key = copy
        return entry

    dict_list_map_inplace(point, model)


def point_optimizer(optimizer: Any, stored: Mapping[str, Any]) -> None:
    """Read an optimizer's fp32 weights from the names that the checkpoint has for them.

    Args:
        optimizer: sharded state of the optimizer; changed in place.
        stored: the checkpoint's tensors by name.
    """
    available = [p for p in (DISTRIBUTED, PLAIN) if any(key.startswith(p) for key in stored)]
    for wanted in (DISTRIBUTED, PLAIN):
        if wanted not in available:
            apply_prefix_mapping(optimizer, {wanted: available[0] if available else ""})


def settle_common(loaded: dict[str, Any], wanted: Any, common: Any) -> None:
    """Put the settings of the parameter groups where this kind of optimizer looks for them.

    Args:
        loaded: the optimizer's state as loaded; changed in place.
        wanted: the sharded state that was to be loaded, which identifies the kind.
        common: the optimizer's part of the checkpoint's ``common.pt``.
    """
    saved = (
        common["param_groups"] if "param_groups" in common else common["optimizer"]["param_groups"]
    )
    saved = [{k: v for k, v in group.items() if k != "params"} for group in saved]
    is_distributed = _SHARDING in wanted
    if is_distributed:
        loaded[_SHARDING] = "fully_reshardable"
        loaded.setdefault("optimizer", {})["param_groups"] = saved
        return
    place = loaded["optimizer"] if "fp32_from_fp16_params" in wanted else loaded
    params = [group["params"] for group in place["param_groups"]]
    place["param_groups"] = [
        {**group, "params": own} for group, own in zip(saved, params, strict=True)
    ]
