"""Checks and warnings at the start, shared by --dry-run and real runs, after ``resolve_run``.

The checks cover the folders that the run writes to. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.checkpoints import checkpoint_bytes
from megatron_llmjp.estimate.data_warnings import (
    START_INDEX_BYTES,
    run_data_warnings,
    shared_document_warnings,
)
from megatron_llmjp.filesystem import nearest_existing, why_not_writable
from megatron_llmjp.formatting import format_count
from megatron_llmjp.run import Run

FEW_INODES = 1000


def check_start(run: Run) -> list[str]:
    """Refuse a run that could not start on this machine.

    Returns:
        Warnings: on the checkpoint it resumes from, its configuration, its data and its folders.

    Raises:
        UserError: one line for each folder that cannot be used.
    """
    problems = list(_folders(run))
    if problems:
        raise UserError("\n".join(problems))
    return [*run.warnings, *run.config_warnings, *run_data_warnings(run), *_space(run)]


def overlap_warnings(run: Run) -> list[str]:
    """Warnings on datasets of a run that hold the same documents; takes a second at most.

    They are for the one process that prints them: others need not look.
    """
    return shared_document_warnings(run.folds, largest=START_INDEX_BYTES)


def _folders(run: Run) -> Iterator[str]:
    """Why a folder that the run writes to cannot be used, with its flag; nothing if all can."""
    config = run.config
    written = {
        "--save": config.checkpoint.save,
        "--tensorboard-dir": config.logging.tensorboard_dir,
    }
    for flag, path in written.items():
        if path and not config.training.eval_only and (problem := why_not_writable(Path(path))):
            yield f"{flag} {path}: {problem}: change that, or give another folder"
    problem = why_not_writable(run.cache)
    if problem is not None and (not run.cache.is_dir() or _lacks_indices(run)):
        yield (
            f"--data-cache-path {run.cache}: {problem}, so sample indices cannot be written there: "
            "change its permissions, or give another folder"
        )


def _lacks_indices(run: Run) -> bool:
    """Whether an index of the run is missing in a cache that cannot be written to."""
    from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset  # torch: seconds
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.data.indices.index_cache import find_damage

    epochs = EpochDatasets(run.config.data, run.tokenizer, run.cache)
    samples = FoldDataset(run.schedule, epochs)
    indices = [index for fold in run.schedule.folds for index in samples.indices(fold)]
    held_out = [ValidationDataset(sets, epochs).index for sets in run.validation.values()]
    return any(find_damage(index.folder) is not None for index in [*indices, *held_out])


def _space(run: Run) -> Iterator[str]:
    """Warnings on a save folder that has no room for a checkpoint."""
    save = run.config.checkpoint.save
    if not save or run.config.training.eval_only:
        return
    try:
        found = os.statvfs(nearest_existing(Path(save)))
    except OSError:
        return
    free, needed = found.f_bavail * found.f_frsize, checkpoint_bytes(run.config)
    if free < needed:
        yield (
            f"--save {save}: {format_count(free)}B are free, but a checkpoint of this run takes "
            f"about {format_count(needed)}B: it cannot be saved until there is room"
        )
    if found.f_files and found.f_favail < FEW_INODES:
        yield f"--save {save}: the file system has room for {found.f_favail} more files only"
