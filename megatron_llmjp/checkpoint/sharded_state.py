"""The sharded state of a run: what a checkpoint contains, and loading it in any layout.

The random state of one rank, as plain data that loads without unpickling code.

Loading the state of one kind of optimizer into another, and of one precision into another.

megatron-core's optimizers name the same numbers differently. The fp32 weights that updates are
added to are ``optimizer.state.param.*`` of the distributed optimizer, those of the plain one are
``optimizer.state.fp32_param.*`` in half precision and the model's own weights in fp32; the settings
of the parameter groups are in two places of ``common.pt``. Here a load is pointed at the names that
a checkpoint has, so that a resume may switch the distributed optimizer on or off and change the
precision without losing a bit of the fp32 weights and moments.

What of a run is in a checkpoint, by rank and tensor, and loading it in any layout.

Reading never writes. Writing is in ``saving.py``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import (
    load_common_state_dict,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_llmjp.checkpoint import safe_unpickling
from megatron_llmjp.checkpoint.reader import threaded_reading
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync


def get_random_state() -> dict[str, Any]:
    """All generators that training draws from."""
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators where :func:`get_random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


DISTRIBUTED, PLAIN = "optimizer.state.param.", "optimizer.state.fp32_param."
"""What precedes a weight's name in the name of its fp32 copy."""

_SHARDING = "param_state_sharding_type"
_HALF = (torch.bfloat16, torch.float16)


def redirect_model_keys(model: Any, stored: Mapping[str, Any], dtype: torch.dtype) -> None:
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


def redirect_optimizer_keys(optimizer: Any, stored: Mapping[str, Any]) -> None:
    """Read an optimizer's fp32 weights from the names that the checkpoint has for them.

    Args:
        optimizer: sharded state of the optimizer; changed in place.
        stored: the checkpoint's tensors by name.
    """
    available = [p for p in (DISTRIBUTED, PLAIN) if any(key.startswith(p) for key in stored)]
    for wanted in (DISTRIBUTED, PLAIN):
        if wanted not in available:
            apply_prefix_mapping(optimizer, {wanted: available[0] if available else ""})


def restore_param_groups(loaded: dict[str, Any], wanted: Any, common: Any) -> None:
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


@dataclass(frozen=True)
class RunState:
    """The live objects of a run that a checkpoint covers."""

    chunks: list[Any]
    """Model chunks of this rank, wrapped or bare."""
    optimizer: Any = None
    scheduler: Any = None
    counters: dict[str, Any] = field(default_factory=dict)
    """Plain data that is the same on all ranks, such as sums of the log, by its owner's name."""


def load_checkpoint(
    folder: Path, state: RunState, work: RankSync = DEFAULT_RANK_SYNC
) -> dict[str, Any]:
    """Load weights, and the optimizer, scheduler and random state where ``state`` has them.

    The layout may differ from the one that saved; the random state is restored only in the same
    one, since it has no meaning in another. ``work`` takes heartbeats, and ranks wait in it for
    the one that reads slowest.

    Returns:
        The counters that were saved, by their owner's name.

    Raises:
        UserError: the folder is damaged, or a file in it wants more than to hold data.
    """
    work.run_on_first_rank(lambda: safe_unpickling.check_pickles(folder))
    sharded = sharded_state_dict(state, is_loading=True)
    stored = load_sharded_metadata(str(folder))
    models = {key: sharded.pop(key) for key, _ in _chunk_keys(state.chunks)}
    if state.optimizer is not None:
        dtype = next(state.chunks[0].parameters()).dtype
        redirect_model_keys(models, stored, dtype)
        redirect_optimizer_keys(sharded["optimizer"], stored)
        if not _has_random_state(stored):
            del sharded["rng_state"]
    with threaded_reading(work):
        # Apart: a weight and its fp32 copy may be read from the same tensor.
        weights = _load_sharded(models, folder)
        loaded = _load_sharded(sharded, folder) if state.optimizer is not None else {}
    for key, chunk in _chunk_keys(state.chunks):
        chunk.load_state_dict(weights[key], strict=True)
    if state.optimizer is None:
        return {}
    common = load_common_state_dict(str(folder))["optimizer"]
    restore_param_groups(loaded["optimizer"], sharded["optimizer"], common)
    with torch.no_grad():
        state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if "rng_state" in loaded:
        set_random_state(loaded["rng_state"])
    counters: dict[str, Any] = loaded.get("counters", {})
    return counters


def _load_sharded(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    strict = StrictHandling.RAISE_UNEXPECTED
    loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(folder), strict=strict)
    return loaded


def _chunk_keys(chunks: list[Any]) -> list[tuple[str, Any]]:
    """Bare chunks and the names of their entries, as in Megatron-LM's checkpoints."""
    bare = unwrap_model(chunks)
    if len(bare) == 1:
        return [("model", bare[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(bare)]


def sharded_state_dict(state: RunState, is_loading: bool) -> dict[str, Any]:
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
