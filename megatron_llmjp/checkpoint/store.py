"""What of a run is in a checkpoint, by rank and tensor, and loading it in any layout.

Reading never writes. Writing is in ``saving.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.checkpoint import optimizer_form, safety
from megatron_llmjp.checkpoint.random_state import get_random_state, set_random_state
from megatron_llmjp.checkpoint.reader import threaded_reading
from megatron_llmjp.runtime.device import without_warnings
from megatron_llmjp.runtime.long_work import UNWATCHED, LongWork

with without_warnings():
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import (
        load_common_state_dict,
        load_sharded_metadata,
    )
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.utils import unwrap_model


@dataclass(frozen=True)
class RunState:
    """The live objects of a run that a checkpoint covers."""

    chunks: list[Any]
    """Model chunks of this rank, wrapped or bare."""
    optimizer: Any = None
    scheduler: Any = None
    counters: dict[str, Any] = field(default_factory=dict)
    """Plain data that is the same on all ranks, such as sums of the log, by its owner's name."""


def load(folder: Path, state: RunState, work: LongWork = UNWATCHED) -> dict[str, Any]:
    """Load weights, and the optimizer, scheduler and random state where ``state`` has them.

    The layout may differ from the one that saved; the random state is restored only in the same
    one, since it has no meaning in another. ``work`` takes heartbeats, and ranks wait in it for
    the one that reads slowest.

    Returns:
        The counters that were saved, by their owner's name.

    Raises:
        UserError: the folder is damaged, or a file in it wants more than to hold data.
    """
    work.first_rank_does(lambda: safety.vet(folder))
    sharded = sharded_state(state, is_loading=True)
    stored = load_sharded_metadata(str(folder))
    models = {key: sharded.pop(key) for key, _ in _chunk_keys(state.chunks)}
    if state.optimizer is not None:
        dtype = next(state.chunks[0].parameters()).dtype
        optimizer_form.point_model(models, stored, dtype)
        optimizer_form.point_optimizer(sharded["optimizer"], stored)
        if not _has_random_state(stored):
            del sharded["rng_state"]
    with threaded_reading(work):
        # Apart: a weight and its fp32 copy may be read from the same tensor.
        weights = _load(models, folder)
        loaded = _load(sharded, folder) if state.optimizer is not None else {}
    for key, chunk in _chunk_keys(state.chunks):
        chunk.load_state_dict(weights[key], strict=True)
    if state.optimizer is None:
        return {}
    common = load_common_state_dict(str(folder))["optimizer"]
    optimizer_form.settle_common(loaded["optimizer"], sharded["optimizer"], common)
    with torch.no_grad():
        state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if "rng_state" in loaded:
        set_random_state(loaded["rng_state"])
    counters: dict[str, Any] = loaded.get("counters", {})
    return counters


def _load(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    strict = StrictHandling.RAISE_UNEXPECTED
    loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(folder), strict=strict)
    return loaded


def _chunk_keys(chunks: list[Any]) -> list[tuple[str, Any]]:
    """Bare chunks and the names of their entries, as in Megatron-LM's checkpoints."""
    bare = unwrap_model(chunks)
    if len(bare) == 1:
        return [("model", bare[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(bare)]


def sharded_state(state: RunState, is_loading: bool) -> dict[str, Any]:
    """Which rank holds which part of which tensor, as dist_checkpointing wants it."""
    metadata = {
        # megatron-core's default raises; this one can be read in any layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    sharded: dict[str, Any] = {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _chunk_keys(state.chunks)
    }
    if state.optimizer is not None:
        models = {key: sharded[key] for key in sharded}
        sharded["optimizer"] = state.optimizer.sharded_state_dict(
            models if len(models) > 1 else sharded["model"],
            is_loading=is_loading,
            metadata=metadata,
        )
        sharded["opt_param_scheduler"] = state.scheduler.state_dict()
        sharded["rng_state"] = _sharded_random_state()
        if not is_loading:
            sharded["counters"] = state.counters
    return sharded


def _random_state_place() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shape and index of this rank's random state over (PP, TP, DP)."""
    p = parallel_state
    return (
        (
            p.get_pipeline_model_parallel_world_size(),
            p.get_tensor_model_parallel_world_size(),
            p.get_data_parallel_world_size(with_context_parallel=True),
        ),
        (
            p.get_pipeline_model_parallel_rank(),
            p.get_tensor_model_parallel_rank(),
            p.get_data_parallel_rank(with_context_parallel=True),
        ),
    )


def _sharded_random_state() -> ShardedObject:
    shape, index = _random_state_place()
    return ShardedObject("rng_state", get_random_state(), shape, index, replica_id=0)


def _has_random_state(stored: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with these entries was saved in this layout."""
    shape, index = _random_state_place()
    own = ShardedObject("rng_state", None, shape, index).unique_key
    return own in stored
