"""Fold schedules, samples, and the documents that samples come from."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_tools.run_flags import parse_run_flags
from data_tools.run_history import open_data_lineage
from megatron_llmjp.api.errors import OutOfRangeError, raises_user_errors
from megatron_llmjp.api.flags import flag_words
from megatron_llmjp.data.folds.schedule import FoldPlan, Schedule
from megatron_llmjp.run_data import index_cache_folder, resolve_data

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage


@dataclass(frozen=True)
class DocumentPart:
    """Consecutive tokens of one document in a sample."""

    dataset: str
    """Name of the dataset in the fold."""
    path: str
    """Path of the dataset, without ``.bin`` and ``.idx``."""
    document: int
    first_token: int
    """Position in the document, from 0."""
    tokens: int


@dataclass(frozen=True)
class Sample:
    """A training sample and its lineage."""

    number: int | None
    """Number among the trained samples, from 0; None for a skipped one."""
    position: int
    """Position in the schedule, which counts skipped samples too."""
    fold: str
    epoch: int | None
    """Epoch of the dataset, from 0; None in Megatron-LM's order."""
    documents: tuple[DocumentPart, ...]
    tokens: npt.NDArray[Any]
    """Ids ``[sequence length + 1]``: inputs and, shifted by one, labels."""


@dataclass(frozen=True)
class ScheduledDataset:
    """The part of a dataset that a fold uses."""

    name: str
    path: str
    samples: int
    epochs: float
    """Number of passes over the dataset until the end of the fold, earlier folds included."""


@dataclass(frozen=True)
class ScheduledFold:
    """A fold of a schedule."""

    name: str
    first_sample: int
    samples: int
    tokens: int
    datasets: tuple[ScheduledDataset, ...]


class FoldSchedule:
    """The folds of a run in order, and their samples.

    Attributes:
        sequence_length: tokens per sample.
        folds: the folds.

    Example:
        >>> schedule = ml.open_schedule("folds.yaml", seq_length=32, global_batch_size=4)
        >>> for fold in schedule.folds:
        ...     print(fold.name, fold.samples, [dataset.name for dataset in fold.datasets])
        general 24 ['ja', 'en']
        japanese 16 ['ja']
    """

    def __init__(
        self, schedule: Schedule, lineage: Callable[[], AbstractContextManager[Lineage]]
    ) -> None:
        self.sequence_length = schedule.sequence_length
        self.folds = tuple(_scheduled_fold(schedule, fold) for fold in schedule.folds)
        self._schedule = schedule
        self._open_lineage, self._lineage = lineage, None
        self._files = ExitStack()
        weakref.finalize(self, self._files.close)

    @property
    def samples(self) -> int:
        """Number of samples that are trained on."""
        return self._schedule.total_samples

    def __len__(self) -> int:
        """Return the number of samples that are trained on."""
        return self.samples

    def __repr__(self) -> str:
        tokens = self.samples * self.sequence_length
        return f"FoldSchedule(folds={len(self.folds)}, samples={self.samples:,}, tokens={tokens:,})"

    def lineage(self) -> Lineage:
        """Return the lookup of documents, opened at first use."""
        if self._lineage is None:
            self._lineage = self._files.enter_context(self._open_lineage())  # type: ignore[assignment]
        assert self._lineage is not None
        return self._lineage

    @raises_user_errors
    def sample(self, number: int) -> Sample:
        """Return the sample that is trained on as ``number``, counted from 0.

        Raises:
            OutOfRangeError: there is no such sample.

        Example:
            >>> schedule = ml.open_schedule("folds.yaml", seq_length=32, global_batch_size=4)
            >>> sample = schedule.sample(30)
            >>> sample.fold, sample.tokens.shape
            ('japanese', (33,))
            >>> {part.dataset for part in sample.documents}
            {'ja'}
        """
        if not 0 <= number < self.samples:
            raise OutOfRangeError(f"sample {number}: expected 0 to {self.samples - 1:,}")
        return self.at_position(self._schedule.position(number))

    @raises_user_errors
    def at_position(self, position: int) -> Sample:
        """Return the sample at a position, which counts skipped samples too.

        Raises:
            OutOfRangeError: there is no such position.

        Example:
            >>> schedule = ml.open_schedule("folds.yaml", seq_length=32, global_batch_size=4)
            >>> schedule.at_position(0).number
            0
        """
        total = self._schedule.total_positions
        if not 0 <= position < total:
            raise OutOfRangeError(f"position {position}: expected 0 to {total - 1:,}")
        from megatron_llmjp.data.lineage import read_tokens

        found = self.lineage().origin(position)
        parts = [read_tokens(span) for span in found.spans]
        documents = tuple(DocumentPart(**vars(span)) for span in found.spans)
        tokens = np.concatenate(parts)
        return Sample(found.number, found.position, found.fold, found.epoch, documents, tokens)


def _scheduled_fold(schedule: Schedule, fold: FoldPlan) -> ScheduledFold:
    datasets = tuple(
        ScheduledDataset(part.name, part.path, part.samples, part.end / part.samples_per_epoch)
        for part in fold.slices
    )
    first, end = schedule.sample_range(fold)
    tokens = (end - first) * schedule.sequence_length
    return ScheduledFold(fold.name, first, end - first, tokens, datasets)


@raises_user_errors
def open_schedule(
    fold_file: str | PathLike[str], *, seq_length: int, global_batch_size: int, **fields: Any
) -> FoldSchedule:
    """Resolve a fold file with its datasets.

    Args:
        fold_file: the fold file.
        seq_length: tokens per sample.
        global_batch_size: samples per iteration, for folds whose length is in iterations.
        fields: further fields of the configuration, such as ``rampup_batch_size``.

    Raises:
        UserError: all problems of the fold file and its datasets.

    Example:
        >>> ml.open_schedule("folds.yaml", seq_length=32, global_batch_size=4)
        FoldSchedule(folds=2, samples=40, tokens=1,280)
    """
    values = {
        "fold_file": fold_file,
        "seq_length": seq_length,
        "global_batch_size": global_batch_size,
        **fields,
    }
    config = parse_run_flags(flag_words(values), "open_schedule").config
    data = resolve_data(config)
    cache = index_cache_folder(config, data.folds)
    return FoldSchedule(
        data.schedule,
        lambda: open_data_lineage(data.schedule, data.datasets, config.data, None, cache),
    )
