"""Samples of the fold schedule, read through megatron-core.

Token ids that no vocabulary has: found where samples are read, and named.

A model would not say so: an id in the rows that pad its embedding is trained on in silence, and
under tensor parallelism any id that no rank has counts as a row of zeros.

Fold schedule -> samples, through megatron-core's GPTDataset.

One GPTDataset is exactly one epoch of one dataset. megatron-core's blended datasets are used for
folds in Megatron-LM's order only: they draw 0.5 % more samples than asked for, repeat a dataset
without being asked, and number their samples anew when a blend changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset

from megatron_llmjp.data.folds.schedule import (
    DatasetSlice,
    FoldPlan,
    HeldOutDataset,
    MegatronBlend,
    Schedule,
    epoch_seed,
)
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.index_cache import CachedIndex
from megatron_llmjp.data.indices.interleave import FoldOrder
from megatron_llmjp.data.indices.megatron_order import megatron_index
from megatron_llmjp.errors import DataError


def check_token_ids(
    sample: dict[str, torch.Tensor], data: Any, number: int, vocab_size: int | None
) -> dict[str, torch.Tensor]:
    """A sample of a GPTDataset, whose tokens are all in the vocabulary.

    Args:
        sample: with ``tokens`` and ``labels``, ``[s]``, in host memory.
        data: the GPTDataset.
        number: of the sample in it.
        vocab_size: ids are in ``[0, vocab_size)``; None for any.

    Raises:
        DataError: one is not; the dataset, the document and the id are named.
    """
    if vocab_size is None:
        return sample
    for name in ("tokens", "labels"):
        low, high = torch.aminmax(sample[name])
        if low < 0 or high >= vocab_size:
            raise DataError(_describe(data, number, vocab_size))
    return sample


def _describe(data: Any, number: int, vocab_size: int) -> str:
    """Look the documents of a sample through for the first such token."""
    row = int(data.shuffle_index[number])
    first, last = (int(place) for place in data.sample_index[row : row + 2, 0])
    path = data.dataset.path_prefix
    for place in range(first, last + 1):
        sequence = int(data.document_index[place])
        tokens = np.asarray(data.dataset[sequence]).astype(np.int64)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(wrong):
            ends = data.dataset.document_indices
            document = int(np.searchsorted(ends, sequence, side="right")) - 1
            return (
                f"dataset {path}, document {document}: token id {tokens[wrong[0]]}, but the "
                f"vocabulary ends at {vocab_size - 1}. The dataset is damaged or was made with "
                "another tokenizer: make it again with preprocess_data, or give its tokenizer"
            )
    return f"dataset {path}, sample {number}: a token id beyond {vocab_size - 1}"


Sample = dict[str, torch.Tensor]


class FoldDataset(Dataset[Sample]):
    """``data[k]``: trained sample number k, whichever fold it is in.

    A sample holds ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each ``[s]``, and
    ``attention_mask`` ``[1, s, s]`` where attention is reset at document ends. A token id beyond
    the vocabulary raises DataError.
    """

    def __init__(self, schedule: Schedule, epochs: EpochDatasets) -> None:
        self.schedule = schedule
        self._epochs = epochs
        self._open_epoch = lru_cache(maxsize=256)(self._epoch)
        self._order = lru_cache(maxsize=2)(lambda fold: FoldOrder(epochs.cache, fold).open())
        self._megatron = lru_cache(maxsize=2)(
            lambda blend: megatron_index(blend, epochs).open(epochs)
        )

    def __len__(self) -> int:
        return self.schedule.total_samples

    def __getitem__(self, index: int) -> Sample:
        fold, inside = self._place(index)
        if fold.megatron is not None:
            samples = self._megatron(fold.megatron)
            _, data, sample = samples.source(inside)
            return check_token_ids(samples[inside], data, sample, self._epochs.vocab_size)
        piece, number = self._source(fold, inside)
        epoch, sample = divmod(number, piece.samples_per_epoch)
        data = self._open_epoch(piece.key, piece.path, epoch)
        return check_token_ids(data[sample], data, sample, self._epochs.vocab_size)

    def locate(self, index: int) -> tuple[DatasetSlice, int]:
        """The dataset of trained sample ``index`` and its number in the dataset's stream.

        In Megatron-LM's order its number in the dataset that Megatron-LM builds of it.
        """
        fold, inside = self._place(index)
        if fold.megatron is not None:
            which, _, number = self._megatron(fold.megatron).source(inside)
            return fold.slices[which], number
        return self._source(fold, inside)

    def indices(self, fold: FoldPlan) -> list[CachedIndex]:
        """What samples of a fold are looked up in; made when needed, or before by others."""
        if fold.megatron is not None:
            return [megatron_index(fold.megatron, self._epochs)]
        found: list[CachedIndex] = [FoldOrder(self._epochs.cache, fold)]
        for piece in fold.slices:
            first = piece.start // piece.samples_per_epoch
            for epoch in range(first, piece.last_epoch + 1 if piece.samples else first):
                seed = epoch_seed(self.schedule.seed, piece.key, epoch)
                found.append(self._epochs.index(piece.key, piece.path, seed))
        return found

    def _place(self, index: int) -> tuple[FoldPlan, int]:
        """The fold of trained sample ``index`` and the sample's number in it."""
        position = self.schedule.position(index)
        fold = self.schedule.fold_at_position(position)
        return fold, position - fold.first_sample

    def _source(self, fold: FoldPlan, inside: int) -> tuple[DatasetSlice, int]:
        which, number = self._order(fold)
        piece = fold.slices[which[inside]]
        return piece, piece.start + int(number[inside])

    def _epoch(self, key: str, path: str, epoch: int) -> GPTDataset:
        return self._epochs.open(key, path, epoch_seed(self.schedule.seed, key, epoch))


class ValidationDataset(Dataset[Sample]):
    """The first samples of a validation set, over again when more are asked for."""

    def __init__(self, held_out: HeldOutDataset | MegatronBlend, epochs: EpochDatasets) -> None:
        self._held_out = held_out
        self._epochs = epochs
        self._samples: Any = None

    @property
    def index(self) -> CachedIndex:
        """What its samples are looked up in."""
        if isinstance(self._held_out, MegatronBlend):
            return megatron_index(self._held_out, self._epochs)
        return self._epochs.index(self._held_out.key, self._held_out.path, self._held_out.seed)

    def __len__(self) -> int:
        return len(self._opened())

    def __getitem__(self, index: int) -> Sample:
        samples = self._opened()
        number = index % len(samples)
        data, sample = samples, number
        if isinstance(self._held_out, MegatronBlend):
            _, data, sample = samples.source(number)
        return check_token_ids(samples[number], data, sample, self._epochs.vocab_size)

    def _opened(self) -> Any:
        if self._samples is None:
            self._samples = self._open()
        return self._samples

    def _open(self) -> Any:
        held_out = self._held_out
        if isinstance(held_out, MegatronBlend):
            return megatron_index(held_out, self._epochs).open(self._epochs)
        return self._epochs.open(held_out.key, held_out.path, held_out.seed)
