"""A run as its checkpoints tell it: its folds, what it skipped, its batches and its tokenizer."""

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
from megatron_llmjp.config.schema import Config
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
from megatron_llmjp.tokenizers.registry import stored_tokenizer

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage


@dataclass(frozen=True)
class RecordedRun:
    """What a checkpoint says of the run up to it, and of its future as planned then."""

    folder: Path
    manifest: Manifest
    config: Config
    schedule: Schedule
    datasets: dict[str, DatasetInfo]
    """What is known of each dataset, by path."""
    sizes: BatchSizeSchedule
    tokenizer: Tokenizer | None
    cache: Path
    """Where the run left its sample indices."""

    def samples_of(self, iteration: int) -> range:
        """Numbers of the samples of a global batch.

        Raises:
            UserError: the run has no such iteration.
        """
        first, end = (self.sizes.consumed_after(i) for i in (iteration - 1, iteration))
        if iteration < 1 or end > self.schedule.total_samples:
            possible, _ = self.sizes.iterations(self.schedule.total_samples)
            raise UserError(f"--iteration {iteration}: the run's data gives 1 to {possible:,}")
        return range(first, end)


def open_run(
    root: Path, covers: Callable[[Manifest], bool], fold_file: Path | None = None
) -> RecordedRun:
    """Read the oldest checkpoint that covers what is asked, or else the newest one.

    Args:
        root: a save folder, or one checkpoint in it.
        covers: whether a checkpoint is late enough to tell.
        fold_file: in place of the one in the checkpoint, where datasets have moved.

    Raises:
        UserError: no checkpoint is whole, or the data is not what it was trained on.
    """
    folder = _choose(root, covers)
    manifest = manifests.read_manifest(folder)
    config = load_config(folder / manifests.CONFIG)
    data = _data(folder, config, fold_file)
    data = with_stored_keys(data, config, manifest.folds)
    schedule = data.schedule.with_skips(SkippedSamples.of(manifest.skips))
    found = history_differences(manifest, schedule)
    if found:
        listed = "\n".join(found)
        raise UserError(
            f"the data is not what {folder} was trained on:\n{listed}\n"
            "--fold-file names a file with the paths of the datasets as they were"
        )
    sizes = BatchSizeSchedule(config)
    if sizes.consumed_after(manifest.iteration) != manifest.consumed_samples:
        raise UserError(
            f"{folder}: iteration {manifest.iteration:,} had trained on "
            f"{manifest.consumed_samples:,} samples, which is not what its batch size gives "
            f"({sizes.consumed_after(manifest.iteration):,}): the batch size changed on the way"
        )
    cache = index_cache_folder(config, data.folds)
    tokenizer = _tokenizer(folder, config)
    return RecordedRun(folder, manifest, config, schedule, data.datasets, sizes, tokenizer, cache)


@contextmanager
def open_lineage(run: RecordedRun, cache: Path | None) -> Iterator[Lineage]:
    """The lineage of a run; imports torch.

    Args:
        run: the run.
        cache: its folder of sample indices; where the run left them when not given. Where there is
            none, indices are made in a temporary folder: looking at a run writes nothing to it.
    """
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.data.lineage import Lineage

    folder = cache or run.cache
    with tempfile.TemporaryDirectory(prefix="inspect_dataset.") as temporary:
        where = folder if folder.is_dir() else Path(temporary)
        unknown = SimpleNamespace(eod_id=0, vocab_size=1)  # decides no sample
        yield Lineage(run.schedule, EpochDatasets(run.config.data, run.tokenizer or unknown, where))


def _choose(root: Path, covers: Callable[[Manifest], bool]) -> Path:
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
        if covers(manifest):
            return folder
    return whole or manifests.newest_checkpoint(root)


def _data(folder: Path, config: Config, fold_file: Path | None) -> ResolvedData:
    """The data by the fold file asked for, or by the checkpoint's copy, or as the flags say."""
    kept = folder / manifests.FOLDS
    path = fold_file or (kept if kept.is_file() else None)
    if path is None:
        return resolve_data(config)  # a checkpoint of before copies were kept
    folds = read_fold_file(path)
    datasets = inspect_datasets(folds)
    schedule = resolve_folds(folds, datasets, config.data.seq_length, BatchSizeSchedule(config))
    return ResolvedData(folds, datasets, schedule)


def _tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """The run's tokenizer, from the checkpoint; None for a run that names none."""
    kind = config.data.tokenizer_type
    stored = stored_tokenizer(folder / manifests.TOKENIZER, kind) if kind else {}
    return load_run_tokenizer(replace_fields(config, **stored))
