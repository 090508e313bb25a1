"""Reconstruction of a run from its checkpoints: folds, skipped samples, batches and tokenizer."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.checkpoint.resume_checks import history_differences
from megatron_llmjp.config.loading import load_config, replace_fields
from megatron_llmjp.config.schema import Config, DataConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.folds.schedule import DatasetInfo, Schedule, SkippedSamples
from megatron_llmjp.errors import UserError
from megatron_llmjp.run_data import (
    ResolvedData,
    index_cache_folder,
    load_run_tokenizer,
    resolve_data,
    with_stored_keys,
)
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage


@dataclass(frozen=True)
class RecordedRun:
    """A run as recorded in one of its checkpoints."""

    folder: Path
    manifest: Manifest
    config: Config
    schedule: Schedule
    datasets: dict[str, DatasetInfo]
    """Dataset facts by path."""
    sizes: BatchSizeSchedule
    tokenizer: Tokenizer | None
    cache: Path
    """Folder of the run's sample indices."""
    skips_of_fold_file: tuple[tuple[int, int], ...] = ()
    """Positions that the fold file skips."""

    def samples_of(self, iteration: int) -> range:
        """Return the sample numbers of the global batch of an iteration.

        Raises:
            UserError: the iteration is out of range.
        """
        first, end = (self.sizes.consumed_after(i) for i in (iteration - 1, iteration))
        if iteration < 1 or end > self.schedule.total_samples:
            possible, _ = self.sizes.iterations(self.schedule.total_samples)
            raise UserError(f"--iteration {iteration}: expected 1 to {possible:,}")
        return range(first, end)


def open_run(
    root: Path, is_late_enough: Callable[[Manifest], bool], fold_file: Path | None = None
) -> RecordedRun:
    """Read the oldest checkpoint that is late enough, or the newest one.

    Args:
        root: a save folder, or one checkpoint in it.
        is_late_enough: whether a checkpoint covers the requested samples.
        fold_file: replaces the one in the checkpoint, for datasets that have moved.

    Raises:
        UserError: no checkpoint is intact, or the data differs from the data it was trained on.
    """
    folder = _choose_checkpoint(root, is_late_enough)
    manifest = manifests.read_manifest(folder)
    config = load_config(folder / manifests.CONFIG)
    data = _load_data(folder, config, fold_file)
    data = with_stored_keys(data, config, manifest.folds)
    schedule = data.schedule.with_skips(SkippedSamples.of(manifest.skips))
    found = history_differences(manifest, schedule)
    if found:
        listed = "\n".join(found)
        raise UserError(
            f"the data differs from the data that {folder} was trained on:\n{listed}\n"
            "give a fold file with the paths of the original datasets with --fold-file"
        )
    sizes = BatchSizeSchedule(config)
    if sizes.consumed_after(manifest.iteration) != manifest.consumed_samples:
        raise UserError(
            f"{folder}: iteration {manifest.iteration:,} had trained on "
            f"{manifest.consumed_samples:,} samples, which contradicts its batch size "
            f"({sizes.consumed_after(manifest.iteration):,}): the batch size changed on the way"
        )
    cache = index_cache_folder(config, data.folds)
    tokenizer = _load_tokenizer(folder, config)
    return RecordedRun(
        folder,
        manifest,
        config,
        schedule,
        data.datasets,
        sizes,
        tokenizer,
        cache,
        tuple(skip.samples for skip in data.folds.skip),
    )


@contextmanager
def open_lineage(
    run: RecordedRun, cache: Path | None, schedule: Schedule | None = None
) -> Iterator[Lineage]:
    """Provide the data lineage of a run; imports torch.

    Args:
        run: the run.
        schedule: with other skipped samples than those of the run, for an earlier attempt.
        cache: folder of sample indices; by default the run's. If the folder does not exist,
            indices are built in a temporary folder, so that nothing is written to the run.
    """
    chosen = schedule or run.schedule
    args = (chosen, run.datasets, run.config.data, run.tokenizer, cache or run.cache)
    with open_data_lineage(*args) as lineage:
        yield lineage


@contextmanager
def open_data_lineage(
    schedule: Schedule,
    datasets: dict[str, DatasetInfo],
    config: DataConfig,
    tokenizer: Tokenizer | None,
    cache: Path,
) -> Iterator[Lineage]:
    """Provide the data lineage of a schedule; imports torch.

    Args:
        schedule: the resolved folds.
        datasets: dataset facts by path.
        config: settings of the data.
        tokenizer: of the run, if it is known.
        cache: folder of sample indices, as in :func:`open_lineage`.
    """
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.data.lineage import Lineage

    with tempfile.TemporaryDirectory(prefix="inspect_dataset.") as temporary:
        where = cache if cache.is_dir() else Path(temporary)
        unknown = SimpleNamespace(eod_id=0, vocab_size=1)  # no sample depends on it
        epochs = EpochDatasets(config, tokenizer or unknown, where, datasets=datasets)
        yield Lineage(schedule, epochs)


def _choose_checkpoint(root: Path, is_late_enough: Callable[[Manifest], bool]) -> Path:
    if (root / manifests.MANIFEST).is_file():
        return root
    whole = None
    for iteration in manifests.complete_iterations(root):
        folder = root / manifests.folder_name(iteration)
        try:
            manifest = manifests.read_manifest(folder)
        except UserError as error:
            print(f"warning: damaged checkpoint: {error}", file=sys.stderr)
            continue
        whole = folder
        if is_late_enough(manifest):
            return folder
    return whole or manifests.newest_checkpoint(root)


def _load_data(folder: Path, config: Config, fold_file: Path | None) -> ResolvedData:
    """Load the data from ``fold_file``, the checkpoint's copy, or the configuration."""
    kept = folder / manifests.FOLDS
    path = fold_file or (kept if kept.is_file() else None)
    if path is None:
        return resolve_data(config)  # an older checkpoint without a copy of the fold file
    folds = read_fold_file(path)
    datasets = inspect_datasets(folds, index_cache_folder(config, folds))
    schedule = resolve_folds(folds, datasets, config.data.seq_length, BatchSizeSchedule(config))
    return ResolvedData(folds, datasets, schedule)


def _load_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """Load the run's tokenizer from the checkpoint; None if the run has none."""
    kind = config.data.tokenizer_type
    stored = stored_tokenizer_fields(folder / manifests.TOKENIZER, kind) if kind else {}
    return load_run_tokenizer(replace_fields(config, **stored))
