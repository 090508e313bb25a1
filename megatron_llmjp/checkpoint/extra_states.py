"""Extra states of modules, which Transformer Engine uses for the scales of fp8 training.

In bf16, fp16 and fp32 they are empty. Norms have them in Transformer Engine and not in torch, so a
checkpoint that contains them could only be loaded into the layers that wrote it. They are therefore
not saved, and not requested from a checkpoint; other names that differ remain an error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"(^|\.)_extra_state(/shard_[\d.]+_[\d.]+)?$")


def is_extra_state(key: str) -> bool:
    """Whether a key of a state dict, or of an object in a checkpoint, is that of an extra state."""
    return _NAME.search(key) is not None


def remove_extra_states(sharded: dict[str, Any]) -> None:
    """Remove the extra states from the sharded state of a model chunk.

    Raises:
        UserError: one is not empty.
    """
    for key in [key for key in sharded if is_extra_state(key)]:
        check_is_empty(key, getattr(sharded.pop(key), "data", None))


def check_is_empty(key: str, value: Any) -> None:
    """Check that an extra state contains nothing.

    Raises:
        UserError: it contains the scales of fp8 training.
    """
    import torch

    if value is None or (isinstance(value, torch.Tensor) and value.numel() == 0):
        return
    raise UserError(
        f"{key} is not empty: it contains the scales of fp8 training, which is not supported. "
        "Convert the weights with convert_checkpoint, which does not need them"
    )


def load_weights(module: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Load all parameters and buffers of a module; extra states may be missing.

    Raises:
        RuntimeError: another name is missing, or unexpected.
    """
    found = module.load_state_dict(weights, strict=False)
    missing = [key for key in found.missing_keys if not is_extra_state(key)]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"the model's tensors differ from the checkpoint's: missing {missing}, unexpected "
            f"{list(found.unexpected_keys)}"
        )
