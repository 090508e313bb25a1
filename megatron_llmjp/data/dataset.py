"""Fold schedule -> samples, through megatron-core's GPTDataset.

One GPTDataset is exactly one epoch of one dataset. megatron-core's blended datasets are not used:
they draw 0.5 % more samples than asked for, and number their samples anew when a blend changes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.data import Dataset

from megatron_llmjp.data.epoch_index import EpochIndex, Epochs
from megatron_llmjp.data.fold_order import FoldOrder
from megatron_llmjp.data.folds import DatasetInfo, FoldPlan, Schedule, Slice, epoch_seed
from megatron_llmjp.data.index_cache import CachedIndex
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.datasets.gpt_dataset import GPTDataset

Sample = dict[str, torch.Tensor]


class FoldDataset(Dataset[Sample]):
    """``data[k]``: trained sample number k, whichever fold it is in.

    A sample holds ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each ``[s]``, and
    ``attention_mask`` ``[1, s, s]`` where attention is reset at document ends.
    """

    def __init__(self, schedule: Schedule, epochs: Epochs) -> None:
        self.schedule = schedule
        self._epochs = epochs
        self._open_epoch = lru_cache(maxsize=256)(self._epoch)
        self._order = lru_cache(maxsize=2)(lambda fold: FoldOrder(epochs.cache, fold).open())

    def __len__(self) -> int:
        return self.schedule.total_samples

    def __getitem__(self, index: int) -> Sample:
        piece, number = self.locate(index)
        epoch, sample = divmod(number, piece.samples_per_epoch)
        item: Sample = self._open_epoch(piece.key, piece.path, epoch)[sample]
        return item

    def locate(self, index: int) -> tuple[Slice, int]:
        """The dataset of trained sample ``index`` and its number in the dataset's stream."""
        position = self.schedule.position(index)
        fold = self.schedule.fold_of(position)
        which, number = self._order(fold)
        inside = position - fold.first_sample
        piece = fold.slices[which[inside]]
        return piece, piece.start + int(number[inside])

    def indices(self, fold: FoldPlan) -> list[CachedIndex]:
        """What samples of a fold are looked up in; made when needed, or before by others."""
        found: list[CachedIndex] = [FoldOrder(self._epochs.cache, fold)]
        for piece in fold.slices:
            first = piece.start // piece.samples_per_epoch
            for epoch in range(first, piece.last_epoch + 1 if piece.samples else first):
                seed = epoch_seed(self.schedule.seed, piece.key, epoch)
                found.append(self._epochs.index(piece.key, piece.path, seed))
        return found

    def _epoch(self, key: str, path: str, epoch: int) -> GPTDataset:
        return self._epochs.open(key, path, epoch_seed(self.schedule.seed, key, epoch))


class ValidationDataset(Dataset[Sample]):
    """The first samples of a validation set, over again when more are asked for."""

    def __init__(self, path: str, info: DatasetInfo, seed: int, epochs: Epochs) -> None:
        self._epochs = epochs
        self._place = (info.key, path, epoch_seed(seed, info.key, 0))
        self._samples: GPTDataset | None = None

    @property
    def index(self) -> EpochIndex:
        """What its samples are looked up in."""
        return self._epochs.index(*self._place)

    def __getitem__(self, index: int) -> Sample:
        if self._samples is None:
            self._samples = self._epochs.open(*self._place)
        item: Sample = self._samples[index % len(self._samples)]
        return item
