"""Save and load a run through megatron-core's dist_checkpointing, in any layout.

A folder has its final name only when it is whole: all ranks write into a temporary one, which is
forced to disk, described by a manifest and renamed; the tracker file changes last. Reading never
writes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

import megatron_llmjp
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.manifest import FileEntry, Manifest
from megatron_llmjp.checkpoint.past import Past
from megatron_llmjp.checkpoint.random_state import get_random_state, set_random_state
from megatron_llmjp.config.load import dump
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.fold_record import FoldRecord
from megatron_llmjp.data.skips import NOTHING_SKIPPED, Skips
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    import megatron.core
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.utils import unwrap_model


@dataclass(frozen=True)
class RunState:
    """The live objects of a run that a checkpoint covers."""

    chunks: list[Any]
    """Model chunks of this rank, wrapped or bare."""
    optimizer: Any = None
    scheduler: Any = None


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0
    folds: Mapping[str, FoldRecord] | None = None
    """The folds touched."""
    skips: Skips = NOTHING_SKIPPED
    past: Past | None = None
    """What else to remember of the data."""
    metrics: Mapping[str, float] | None = None


def save(
    root: Path, state: RunState, progress: Progress, config: Config, tokenizer_files: list[Path]
) -> Path:
    """Write ``root/iter_*`` for this iteration; all ranks call it.

    Returns:
        The finished folder.
    """
    first = dist.get_rank() == 0
    final = root / manifests.folder_name(progress.iteration)
    temporary = root / f".{final.name}.tmp"
    if first:
        _clean(root)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(
        _sharded_state(state, is_loading=False), str(temporary), validate_access_integrity=True
    )
    if first:
        _add_plain_files(temporary, config, tokenizer_files)
    files = _describe_together(temporary)
    if first:
        contents = Manifest(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            contents="full",
            folds=dict(progress.folds or {}),
            skips=list(progress.skips.ranges),
            skipped_iterations=dict(progress.past.skipped_iterations) if progress.past else {},
            overrides=list(progress.past.overrides) if progress.past else [],
            metrics=dict(progress.metrics or {}),
            versions=_versions(),
            files=files,
        )
        manifests.write(temporary, contents)
        _publish(temporary, final)
        manifests.write_durably(root / manifests.TRACKER, f"{progress.iteration}\n")
    dist.barrier()
    return final


def load(folder: Path, state: RunState) -> None:
    """Load weights, and the optimizer, scheduler and random state where ``state`` has them.

    The layout may differ from the one that saved; the random state is restored only in the same
    one, since it has no meaning in another.
    """
    sharded = _sharded_state(state, is_loading=True)
    if state.optimizer is not None and not _has_random_state(folder):
        del sharded["rng_state"]
    loaded = dist_checkpointing.load(sharded, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    for key, chunk in _chunk_keys(state.chunks):
        chunk.load_state_dict(loaded[key], strict=True)
    if state.optimizer is None:
        return
    with torch.no_grad():
        state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if "rng_state" in loaded:
        set_random_state(loaded["rng_state"])


def _chunk_keys(chunks: list[Any]) -> list[tuple[str, Any]]:
    """Bare chunks and the names of their entries, as in Megatron-LM's checkpoints."""
    bare = unwrap_model(chunks)
    if len(bare) == 1:
        return [("model", bare[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(bare)]


def _sharded_state(state: RunState, is_loading: bool) -> dict[str, Any]:
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


def _has_random_state(folder: Path) -> bool:
    """Whether a checkpoint was saved in this layout."""
    shape, index = _random_state_place()
    own = ShardedObject("rng_state", None, shape, index).unique_key
    return own in load_sharded_metadata(str(folder))


def _clean(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    if root.is_dir():
        for partial in root.glob(".iter_*.tmp"):
            shutil.rmtree(partial)


def _add_plain_files(folder: Path, config: Config, tokenizer_files: list[Path]) -> None:
    manifests.write_durably(folder / manifests.CONFIG, dump(config))
    if tokenizer_files:
        (folder / manifests.TOKENIZER).mkdir()
    for path in tokenizer_files:
        shutil.copyfile(path, folder / manifests.TOKENIZER / path.name)


def _describe_together(folder: Path) -> dict[str, FileEntry]:
    """Checksums of all files; each rank reads a share of them."""
    dist.barrier()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = manifests.describe_files(folder, manifests.all_files(folder)[rank::ranks])
    entries: list[Any] = [None] * ranks
    dist.all_gather_object(entries, mine)
    return {name: entry for part in entries for name, entry in sorted(part.items())}


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, over an older one of the same iteration."""
    manifests.sync_folder(temporary)
    if final.exists():
        stale = final.with_name(f".{final.name}.old.tmp")
        final.replace(stale)
        temporary.replace(final)
        shutil.rmtree(stale)
    else:
        temporary.replace(final)
    manifests.sync_folder(final.parent)


def _versions() -> dict[str, str]:
    return {
        "megatron_llmjp": megatron_llmjp.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
    }
