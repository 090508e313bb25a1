"""Fix of the parameter offsets in the state that the distributed optimizer saves.

What: ``get_parameter_state_dp_zero`` of one ``DistributedOptimizer``.

Why: it concatenates the buckets of a buffer without the padding between them, but parameters are
looked up at offsets that include the padding (buckets are padded to a multiple of 128 and of the
data-parallel size). Behind the first padded bucket, all states in a ``fully_reshardable``
checkpoint are shifted.

Remove when the offsets of ``buffer.param_index_map`` are valid in the returned tensors without it.
Not the case in megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def keep_bucket_padding(optimizer: Any) -> None:
    """Return the state of a distributed optimizer with the padding between buckets."""
    gather = optimizer.get_parameter_state_dp_zero

    def with_padding(*arguments: Any, **options: Any) -> Any:
        state = gather(*arguments, **options)
        if state is None:
            return None
        for index, buffer in enumerate(optimizer.buffers):
            for tensors in state[index].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key] = _insert_padding(tensors[key], buffer)
        return state

    optimizer.get_parameter_state_dp_zero = with_padding


def _insert_padding(gathered: Tensor, buffer: Any) -> Tensor:
    """Move concatenated buckets to their offsets in the buffer."""
    padded = gathered.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + end - start] = gathered[start:end]
        start = end
    return padded
