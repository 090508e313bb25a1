"""Checks and warnings at the start, shared by --dry-run and real runs, after ``resolve_run``.

The checks cover installed kernels, and the folders that the run writes to. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.checkpoints import checkpoint_bytes, count_checkpoints
from megatron_llmjp.estimate.data_warnings import run_data_warnings
from megatron_llmjp.estimate.shared_documents import START_INDEX_BYTES, shared_document_warnings
from megatron_llmjp.filesystem import nearest_existing, why_not_writable
from megatron_llmjp.formatting import format_count
from megatron_llmjp.run import Run

MIN_FREE_INODES = 1000


def check_start(run: Run) -> list[str]:
    """Check that a run can start on this machine.

    Returns:
        Warnings on the resumed checkpoint, the configuration, the data and the folders.

    Raises:
        UserError: one line for each unusable folder.
    """
    problems = list(_folders(run))
    if problems:
        raise UserError("\n".join(problems))
    return [*run.warnings, *run.config_warnings, *run_data_warnings(run), *_space(run)]


def overlap_warnings(run: Run) -> list[str]:
    """Return warnings on datasets of a run that share documents; takes at most a second.

    Only the process that prints them needs to call this.
    """
    return shared_document_warnings(run.folds, largest=START_INDEX_BYTES)


def _folders(run: Run) -> Iterator[str]:
    """Yield one line for each folder of the run that cannot be written, with its flag."""
    config = run.config
    written = {
        "--save": config.checkpoint.save,
        "--tensorboard-dir": config.logging.tensorboard_dir,
    }
    for flag, path in written.items():
        if path and not config.training.eval_only and (problem := why_not_writable(Path(path))):
            yield f"{flag} {path}: {problem}: fix it, or choose another folder"
    problem = why_not_writable(run.cache)
    if problem is not None and _lacks_indices(run):
        yield (
            f"--data-cache-path {run.cache}: {problem}, so sample indices cannot be written there: "
            "change its permissions, or choose another folder"
        )


def _lacks_indices(run: Run) -> bool:
    """Return whether a read-only index cache lacks an index of the run."""
    from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset  # torch: seconds
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.data.indices.index_cache import find_damage

    epochs = EpochDatasets(run.config.data, run.tokenizer, run.cache)
    samples = FoldDataset(run.schedule, epochs)
    indices = [index for fold in run.schedule.folds for index in samples.indices(fold)]
    for held_out in run.validation.values():
        indices += ValidationDataset(held_out, epochs).indices
    return any(find_damage(index.folder) is not None for index in indices)


def _checkpoints_to_keep(run: Run, done: int) -> int:
    """Return the number of checkpoints that the run adds after iteration ``done`` and keeps."""
    ends = tuple(run.schedule.sample_range(fold)[1] for fold in run.schedule.folds)
    kept = [count_checkpoints(run.config, n, ends, None).kept for n in (run.train_iters, done)]
    return kept[0] - kept[1]


def _space(run: Run) -> Iterator[str]:
    """Yield warnings on a save folder without space for a checkpoint."""
    save = run.config.checkpoint.save
    if not save or run.config.training.eval_only:
        return
    try:
        found = os.statvfs(nearest_existing(Path(save)))
    except OSError:
        return
    free, needed = found.f_bavail * found.f_frsize, checkpoint_bytes(run.config)
    done = run.resume.manifest.iteration if run.resume and not run.config.checkpoint.finetune else 0
    if free < needed:
        yield (
            f"--save {save}: {format_count(free)}B are free, but a checkpoint of this run takes "
            f"about {format_count(needed)}B: it cannot be saved until space is freed"
        )
    elif free < (number := _checkpoints_to_keep(run, done)) * needed:
        yield (
            f"--save {save}: {format_count(free)}B are free, but the run will keep {number:,} more "
            f"checkpoints of {format_count(needed)}B: set keep_last, or move old ones elsewhere"
        )
    if found.f_files and found.f_favail < MIN_FREE_INODES:
        yield f"--save {save}: the file system has {found.f_favail} free inodes only"
