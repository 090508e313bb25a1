"""Sharded state of a run: contents of a checkpoint by rank, and loading it in any parallel layout.

megatron-core's optimizers use different keys for the same tensors. The fp32 main weights are
``optimizer.state.param.*`` of the distributed optimizer; those of the non-distributed one are
``optimizer.state.fp32_param.*`` in half precision and the model's own weights in fp32. The options
of the parameter groups are stored in two different places of ``common.pt``. On load, the keys of
the sharded state are redirected to those in the checkpoint, so that a resume can switch the
distributed optimizer on or off and change the precision; fp32 weights and moments stay
bit-identical.

Random states are stored as plain data that loads without unpickling code. Saving is in ``save.py``.
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
from megatron_llmjp.checkpoint.extra_states import load_weights, remove_extra_states
from megatron_llmjp.checkpoint.reader import threaded_reading
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync

DISTRIBUTED, PLAIN = "optimizer.state.param.", "optimizer.state.fp32_param."
"""Key prefixes of the fp32 main weights, with and without the distributed optimizer."""
_SHARDING = "param_state_sharding_type"
_HALF = (torch.bfloat16, torch.float16)
_GROUP_KEYS, _EXPERTS = ("wd_mult", "lr_mult", "is_decoupled_lr"), "is_expert_parallel"
"""Keys of megatron-core's parameter groups that identify them."""


def get_random_state() -> dict[str, Any]:
    """Return the state of all random generators of this rank."""
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
    """Restore the random generators from :func:`get_random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def redirect_model_keys(model: Any, stored: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Load weights from the fp32 main weights of a checkpoint in another half precision.

    An fp32 model would otherwise start from rounded weights, a model in fp16 from those rounded to
    bf16.

    Args:
        model: sharded state of the model; changed in place.
        stored: the checkpoint's tensors by key, without data.
        dtype: dtype of the model's weights.
    """
    others = [half for half in _HALF if half != dtype]

    def point(entry: Any) -> Any:
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            found = stored.get(entry.key)
            copies = (f"{prefix}{entry.key}" for prefix in (PLAIN, DISTRIBUTED))
            copy = next((key for key in copies if key in stored), None)
            if copy is not None and getattr(found, "dtype", None) in others:
                entry.key = copy
        return entry

    dict_list_map_inplace(point, model)


def redirect_optimizer_keys(optimizer: Any, stored: Mapping[str, Any]) -> None:
    """Load an optimizer's fp32 main weights from the keys that the checkpoint has for them.

    Args:
        optimizer: sharded state of the optimizer; changed in place.
        stored: the checkpoint's tensors by key.
    """
    available = [p for p in (DISTRIBUTED, PLAIN) if any(key.startswith(p) for key in stored)]
    for prefix in (DISTRIBUTED, PLAIN):
        if prefix not in available:
            apply_prefix_mapping(optimizer, {prefix: available[0] if available else ""})


def restore_param_groups(
    loaded: dict[Any, Any], requested: Any, common: Any, optimizer: Any
) -> Any:
    """Return the loaded state with the options of the parameter groups where they are expected.

    With expert parallelism there are two optimizers, of the experts and of all other parameters,
    whose states are numbered. The checkpoint's may have been divided otherwise.

    Args:
        loaded: loaded state of the optimizer; changed in place.
        requested: sharded state that was requested, which identifies the kind of optimizer.
        common: the optimizer's entry in the checkpoint's ``common.pt``.
        optimizer: megatron-core's optimizer. The options of its groups complete those of the
            checkpoint: Transformer Engine's Adam has ``bias_correction``, and ``step`` after its
            first step.
    """
    states = [common[key] for key in sorted(common)] if 0 in common else [common]
    saved = [group for state in states for group in _groups(state)]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(parts) == 1:
        loaded = {key: value for key, value in loaded.items() if isinstance(key, str)}
        _restore_groups(loaded, requested, saved, parts[0].param_groups)
        return loaded
    numbered = {number: loaded.get(number, {}) for number in range(len(parts))}
    for number, part in enumerate(parts):
        _restore_groups(numbered[number], requested[number], saved, part.param_groups)
    return numbered


def _groups(state: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        state["param_groups"] if "param_groups" in state else state["optimizer"]["param_groups"]
    )
    return found


def _restore_groups(
    loaded: dict[str, Any],
    requested: Any,
    saved: list[dict[str, Any]],
    current: list[dict[str, Any]],
) -> None:
    """Move the options of the parameter groups of one optimizer; see above."""
    groups = [
        {k: v for k, v in {**own, **_same_group(own, saved)}.items() if k != "params"}
        for own in current
    ]
    if _SHARDING in requested:
        loaded[_SHARDING] = "fully_reshardable"
        loaded.setdefault("optimizer", {})["param_groups"] = groups
        return
    state = loaded["optimizer"] if "fp32_from_fp16_params" in requested else loaded
    params = [group["params"] for group in state["param_groups"]]
    state["param_groups"] = [
        {**group, "params": own} for group, own in zip(groups, params, strict=True)
    ]


def _same_group(own: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the options of the saved group with the same weight decay, without its identity.

    Groups of experts exist with expert parallelism only; without it, experts are in the others.
    """
    kind = [key for key in _GROUP_KEYS if key in own]
    same = [group for group in saved if all(group.get(key) == own[key] for key in kind)]
    exact = [group for group in same if group.get(_EXPERTS) == own.get(_EXPERTS)]
    (found, *_) = (*exact, *same, *saved)
    return {key: value for key, value in found.items() if key not in (*kind, _EXPERTS)}


@dataclass(frozen=True)
class RunState:
    """The objects of a run whose state is saved."""

    chunks: list[Any]
    """Model chunks of this rank, with or without data-parallel wrapper."""
    optimizer: Any = None
    scheduler: Any = None
    counters: dict[str, Any] = field(default_factory=dict)
    """Plain data, the same on all ranks, such as running sums of the log, by component."""


def load_checkpoint(
    folder: Path, state: RunState, sync: RankSync = DEFAULT_RANK_SYNC
) -> dict[str, Any]:
    """Load the weights and, if ``state`` has them, optimizer, scheduler and random state.

    The parallel layout may differ from that of the save; random states are restored only in the
    same layout. ``sync`` provides heartbeats, and barriers without a timeout.

    Returns:
        The saved counters by component.

    Raises:
        UserError: the folder is damaged, or a file in it contains more than data.
    """
    sync.run_on_first_rank(lambda: safe_unpickling.check_pickles(folder))
    sharded = sharded_state_dict(state, is_loading=True)
    stored = load_sharded_metadata(str(folder))
    models = {key: sharded.pop(key) for key, _ in _chunk_keys(state.chunks)}
    if state.optimizer is not None:
        dtype = next(state.chunks[0].parameters()).dtype
        redirect_model_keys(models, stored, dtype)
        redirect_optimizer_keys(sharded["optimizer"], stored)
        if not _has_random_state(stored):
            del sharded["rng_state"]
    with threaded_reading(sync):
        # Separate loads: a weight and its fp32 copy may be loaded from the same tensor.
        weights = _load_sharded(models, folder)
        loaded = _load_sharded(sharded, folder) if state.optimizer is not None else {}
    for key, chunk in _chunk_keys(state.chunks):
        load_weights(chunk, weights[key])
    if state.optimizer is None:
        return {}
    common = load_common_state_dict(str(folder))["optimizer"]
    restored = restore_param_groups(
        loaded["optimizer"], sharded["optimizer"], common, state.optimizer
    )
    with torch.no_grad():
        state.optimizer.load_state_dict(restored)
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
    """Return the unwrapped chunks with their keys in Megatron-LM's checkpoints."""
    bare = unwrap_model(chunks)
    if len(bare) == 1:
        return [("model", bare[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(bare)]


def sharded_state_dict(state: RunState, is_loading: bool) -> dict[str, Any]:
    """Return the sharded state dict of ``megatron.core.dist_checkpointing``."""
    metadata = {
        # Can be loaded in any layout, unlike megatron-core's default.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    sharded: dict[str, Any] = {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _chunk_keys(state.chunks)
    }
    for model in sharded.values():
        remove_extra_states(model)
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


def _random_state_index() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return world sizes and indices of this rank's random state over (PP, TP, DP)."""
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
    shape, index = _random_state_index()
    return ShardedObject("rng_state", get_random_state(), shape, index, replica_id=0)


def _has_random_state(stored: Mapping[str, Any]) -> bool:
    """Whether a checkpoint contains this rank's random state for the same layout."""
    shape, index = _random_state_index()
    own = ShardedObject("rng_state", None, shape, index).unique_key
    return own in stored
