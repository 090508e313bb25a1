"""Map-style datasets over the fold schedule and the validation sets.

Samples are made by megatron-core's ``GPTDataset``, one for each epoch of each dataset, from tokens
that are read through a bounded number of open files (``data/open_files.py``). megatron-core's
blended datasets are used only for folds in Megatron-LM's order: they draw 0.5 % more samples than
requested, repeat datasets without a warning, and renumber all samples when a blend changes.

Token ids are checked against the vocabulary as samples are read, because the model would not detect
an invalid one: an id within the padding of the vocabulary is trained on without an error, and under
tensor parallelism an id that belongs to no rank is embedded as a vector of zeros.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset

from megatron_llmjp.data.documents import DOCUMENT_STARTS, document_starts
from megatron_llmjp.data.folds.schedule import (
    DatasetSlice,
    FoldPlan,
    HeldOutDataset,
    MegatronBlend,
    Schedule,
    epoch_seed,
)
from megatron_llmjp.data.indices.epoch_index import OPEN_DATASETS, EpochDatasets
from megatron_llmjp.data.indices.index_cache import CachedIndex
from megatron_llmjp.data.indices.interleave import FoldOrder, fold_order
from megatron_llmjp.data.indices.megatron_order import megatron_index
from megatron_llmjp.data.indices.sample_spans import sequence_spans
from megatron_llmjp.errors import DataError

Sample = dict[str, torch.Tensor]


def _checked_sample(sample: Sample, data: Any, number: int, epochs: EpochDatasets) -> Sample:
    """Return a sample of a GPTDataset, with the starts of its documents if attention needs them.

    Args:
        sample: ``tokens`` and ``labels``, each ``[s]``, in host memory.
        data: the GPTDataset that holds the sample.
        number: index of the sample in ``data``.
        epochs: settings of the samples.

    Raises:
        DataError: an id is out of range; the message names the dataset, the document and the id.
    """
    if epochs.vocab_size is not None:
        _check_token_ids(sample, data, number, epochs.vocab_size)
    if epochs.restricts_attention:
        starts = document_starts(sample["tokens"], epochs.tokenizer.eod)
        return {**sample, DOCUMENT_STARTS: starts}
    return sample


def _check_token_ids(sample: Sample, data: Any, number: int, vocab_size: int) -> None:
    """Raise DataError unless all token ids are in ``[0, vocab_size)``."""
    for name in ("tokens", "labels"):
        low, high = torch.aminmax(sample[name])
        if low < 0 or high >= vocab_size:
            raise DataError(_locate_invalid_id(data, number, vocab_size))


def _locate_invalid_id(data: Any, number: int, vocab_size: int) -> str:
    """Return the error message for the first out-of-range token id of a sample."""
    path = data.dataset.path_prefix
    for sequence, _, _ in sequence_spans(data, number):
        tokens = np.asarray(data.dataset[sequence]).astype(np.int64)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(wrong):
            document = data.dataset.document_of(sequence)
            return (
                f"dataset {path}, document {document}: token id {tokens[wrong[0]]} is outside the "
                f"vocabulary (largest id {vocab_size - 1}). The dataset is damaged or was "
                "tokenized with another tokenizer: rebuild it with preprocess_data, or give its "
                "tokenizer"
            )
    return f"dataset {path}, sample {number}: a token id is outside 0 to {vocab_size - 1}"


class FoldDataset(Dataset[Sample]):
    """Map-style dataset over a whole schedule: ``data[k]`` is trained sample ``k``.

    A sample is a dictionary of ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each
    ``[s]``, and ``document_starts`` (``data/documents.py``) if attention is restricted to
    documents. A token id outside the vocabulary raises DataError.
    """

    def __init__(self, schedule: Schedule, epochs: EpochDatasets) -> None:
        self.schedule = schedule
        self._epochs = epochs
        self._open_epoch = lru_cache(maxsize=OPEN_DATASETS)(self._epoch)
        self._order = lru_cache(maxsize=2)(partial(fold_order, schedule.shuffle, epochs.cache))
        self._megatron = lru_cache(maxsize=2)(
            lambda blend: megatron_index(blend, epochs).open(epochs)
        )

    def __len__(self) -> int:
        return self.schedule.total_samples

    def __getitem__(self, index: int) -> Sample:
        fold, inside = self._fold_and_offset(index)
        if fold.megatron is not None:
            samples = self._megatron(fold.megatron)
            _, data, sample = samples.source(inside)
            return _checked_sample(samples[inside], data, sample, self._epochs)
        dataset_slice, number = self._slice_and_sample(fold, inside)
        epoch, sample = divmod(number, dataset_slice.samples_per_epoch)
        data = self._open_epoch(dataset_slice.key, dataset_slice.path, epoch)
        return _checked_sample(data[sample], data, sample, self._epochs)

    def locate(self, index: int) -> tuple[DatasetSlice, int]:
        """Return the dataset slice of trained sample ``index`` and its number in that stream.

        For a fold in Megatron-LM's order, the number refers to the dataset that Megatron-LM builds.
        """
        fold, inside = self._fold_and_offset(index)
        if fold.megatron is not None:
            which, _, number = self._megatron(fold.megatron).source(inside)
            return fold.slices[which], number
        return self._slice_and_sample(fold, inside)

    def indices(self, fold: FoldPlan) -> list[CachedIndex]:
        """Return the stored sample indices that reading a fold requires, built or not."""
        if fold.megatron is not None:
            return [megatron_index(fold.megatron, self._epochs)]
        if self.schedule.shuffle == "blocks":
            return []
        found: list[CachedIndex] = [FoldOrder(self._epochs.cache, fold)]
        for dataset_slice in fold.slices:
            first = dataset_slice.start // dataset_slice.samples_per_epoch
            for epoch in range(
                first, dataset_slice.last_epoch + 1 if dataset_slice.samples else first
            ):
                seed = epoch_seed(self.schedule.seed, dataset_slice.key, epoch)
                found.append(self._epochs.index(dataset_slice.key, dataset_slice.path, seed))
        return found

    def _fold_and_offset(self, index: int) -> tuple[FoldPlan, int]:
        """Return the fold of trained sample ``index`` and the sample's offset in the fold."""
        position = self.schedule.position(index)
        fold = self.schedule.fold_at_position(position)
        return fold, position - fold.first_sample

    def _slice_and_sample(self, fold: FoldPlan, inside: int) -> tuple[DatasetSlice, int]:
        place, number = self._order(fold).locate(inside)
        dataset_slice = fold.slices[place]
        return dataset_slice, dataset_slice.start + number

    def _epoch(self, key: str, path: str, epoch: int) -> GPTDataset:
        seed = epoch_seed(self.schedule.seed, key, epoch)
        return self._epochs.open(key, path, seed, self.schedule.shuffle)


class ValidationDataset(Dataset[Sample]):
    """Map-style dataset over a validation set; indices beyond its end wrap around."""

    def __init__(self, held_out: HeldOutDataset | MegatronBlend, epochs: EpochDatasets) -> None:
        self._held_out = held_out
        self._epochs = epochs
        self._samples: Any = None

    @property
    def indices(self) -> list[CachedIndex]:
        """The stored sample indices that reading this set requires, built or not."""
        held_out = self._held_out
        if isinstance(held_out, MegatronBlend):
            return [megatron_index(held_out, self._epochs)]
        if held_out.shuffle == "blocks":
            return []
        return [self._epochs.index(held_out.key, held_out.path, held_out.seed)]

    def __len__(self) -> int:
        return len(self._opened())

    def __getitem__(self, index: int) -> Sample:
        samples = self._opened()
        number = index % len(samples)
        data, sample = samples, number
        if isinstance(self._held_out, MegatronBlend):
            _, data, sample = samples.source(number)
        return _checked_sample(samples[number], data, sample, self._epochs)

    def _opened(self) -> Any:
        if self._samples is None:
            self._samples = self._open()
        return self._samples

    def _open(self) -> Any:
        held_out = self._held_out
        if isinstance(held_out, MegatronBlend):
            return megatron_index(held_out, self._epochs).open(self._epochs)
        return self._epochs.open(held_out.key, held_out.path, held_out.seed, held_out.shuffle)
