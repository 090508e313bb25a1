"""States of the random generators of a run's ranks, in the form of Megatron-LM's checkpoints.

Both programs seed the same generators of torch, numpy, Python and megatron-core's tracker with the
same offsets per rank, so that a state means the same in both, for the same tensor and pipeline
parallel sizes and the same kind of device. Source: ``get_rng_state`` in
megatron/training/checkpointing.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_llmjp.convert.files import torch_dist

if TYPE_CHECKING:
    import torch

NAME = "rng_state"
_KEY = re.compile(rf"{NAME}/shard_(\d+)\.(\d+)\.(\d+)_(\d+)\.(\d+)\.(\d+)")
_CUDA_STATE_BYTES = 16
"""Seed and offset of CUDA's Philox generator; the state of a CPU generator is longer."""


@dataclass(frozen=True)
class RandomStates:
    """States by pipeline, tensor-parallel and data-parallel rank, as Megatron-LM stores them."""

    pipeline: int
    tensor: int
    states: dict[tuple[int, int], list[dict[str, Any]]]
    """By pipeline and tensor-parallel rank: one per data-parallel rank."""

    @property
    def data(self) -> int:
        """Data parallel size."""
        return len(self.states[0, 0])

    @property
    def is_of_cuda(self) -> bool:
        """Whether the run used GPUs."""
        found = (state["cuda_rng_state"] for ranks in self.states.values() for state in ranks)
        return all(state.numel() == _CUDA_STATE_BYTES for state in found)

    def shards(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield Megatron-LM's keys in distributed checkpoints, and the objects."""
        for (stage, rank), found in self.states.items():
            yield f"{NAME}/shard_{stage}.{rank}_{self.pipeline}.{self.tensor}", found


def read_native_states(folder: Path) -> RandomStates | None:
    """Read the states in a native checkpoint; None if it has none.

    Raises:
        UserError: an object is damaged.
    """
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    sizes: tuple[int, ...] = ()
    for key, value in torch_dist.read_objects(folder, NAME).items():
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        numbers = tuple(int(number) for number in match.groups())
        found[numbers[:3]], sizes = _megatron_state(value), numbers[3:]
    if not found or len(found) != sizes[0] * sizes[1] * sizes[2]:
        return None
    pipeline, tensor, data = sizes
    return RandomStates(
        pipeline,
        tensor,
        {
            (p, t): [found[p, t, d] for d in range(data)]
            for p in range(pipeline)
            for t in range(tensor)
        },
    )


def _megatron_state(stored: Any) -> dict[str, Any]:
    """Return the state of one rank under Megatron-LM's names."""
    state = stored[0] if isinstance(stored, list) else stored
    version, words, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    return {
        "random_rng_state": (version, tuple(words), gauss),
        "np_rng_state": (
            name,
            keys.read().numpy().astype(np.uint32),
            position,
            has_gauss,
            cached,
        ),
        "torch_rng_state": state["torch"].read(),
        "cuda_rng_state": state["cuda"].read(),
        "rng_tracker_states": {name: _tensor(value) for name, value in state["tracker"].items()},
    }


def _tensor(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value.read()
    return tensor
