"""History of a GPU's allocations, and its snapshots: at the first out-of-memory error, on demand.

A snapshot contains every block with the Python stack that allocated it;
https://docs.pytorch.org/memory_viz draws it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.config.schema import Config
from megatron_llmjp.filesystem import warn

PROFILE_FOLDER = "profile"
"""Folder in the save folder that traces, snapshots and reports on memory are written to."""
MAX_ENTRIES = 100_000
"""Number of allocations and frees that are kept, as in Megatron-LM."""


def profile_folder(config: Config) -> Path | None:
    """Return the folder of traces and snapshots; None without a save folder."""
    save = config.checkpoint.save
    return Path(save) / PROFILE_FOLDER if save is not None else None


def snapshot_path(config: Config, rank: int) -> Path:
    """Return the file of a rank's snapshots: the configured name with the rank before its suffix.

    Args:
        config: a configuration with ``memory_snapshot_path`` or a save folder.
        rank: rank of this process.
    """
    given = config.profiling.memory_snapshot_path
    path = (
        Path(given) if given is not None else (profile_folder(config) or Path()) / "memory.pickle"
    )
    return path.with_name(f"{path.stem}-rank{rank}{path.suffix}")


def record_memory_history(config: Config, rank: int) -> None:
    """Record the allocations of this GPU if configured; write a snapshot when memory runs out.

    The observer is called before the error unwinds the stack and frees tensors.
    """
    if not config.profiling.record_memory_history:
        return
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")

    def write(device: int, requested: int, total: int, free: int) -> None:
        write_snapshot(config, rank)

    core: Any = torch._C
    core._cuda_attach_out_of_memory_observer(write)


def write_snapshot(config: Config, rank: int) -> None:
    """Write a snapshot of this GPU's memory; a full disk must not end the run."""
    path = snapshot_path(config, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        warn(f"{path}: the memory snapshot was not written: {error}")
    else:
        print(f"memory snapshot of rank {rank}: {path}", flush=True)
