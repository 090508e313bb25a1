"""Fold schedule -> samples, through megatron-core's GPTDataset.

One GPTDataset is exactly one epoch of one dataset. megatron-core's blended datasets are not used:
they draw 0.5 % more samples than asked for, and number their samples anew when a blend changes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_llmjp.data.epoch_index import Epochs
from megatron_llmjp.data.folds import DatasetInfo, FoldPlan, Schedule, Slice, epoch_seed
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.datasets import helpers_cpp
    from megatron.core.datasets.gpt_dataset import GPTDataset

Sample = dict[str, torch.Tensor]


class FoldDataset(Dataset[Sample]):
    """``sample(i)``: the run's sample number i, whichever fold it is in.

    A sample holds ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each ``[s]``, and
    ``attention_mask`` ``[1, s, s]`` where attention is reset at document ends.
    """

    def __init__(self, schedule: Schedule, epochs: Epochs) -> None:
        self._schedule = schedule
        self._epochs = epochs
        self._open_epoch = lru_cache(maxsize=256)(self._epoch)
        self._order = lru_cache(maxsize=2)(blend_order)

    def __len__(self) -> int:
        return self._schedule.total_samples

    def __getitem__(self, index: int) -> Sample:
        piece, position = self.locate(index)
        epoch, sample = divmod(position, piece.samples_per_epoch)
        item: Sample = self._open_epoch(piece.key, piece.path, epoch)[sample]
        return item

    def locate(self, index: int) -> tuple[Slice, int]:
        """The dataset of a sample and its position in the dataset's stream."""
        fold = self._schedule.fold_at(index)
        which, position = self._order(fold)
        inside = index - fold.first_sample
        piece = fold.slices[which[inside]]
        return piece, piece.start + int(position[inside])

    def build_caches(self) -> None:
        """Make the sample indices of all folds."""
        for fold in self._schedule.folds:
            for piece in fold.slices:
                first = piece.start // piece.samples_per_epoch
                for epoch in range(first, piece.last_epoch + 1 if piece.samples else first):
                    seed = epoch_seed(self._schedule.seed, piece.key, epoch)
                    self._epochs.build(piece.key, piece.path, seed)

    def _epoch(self, key: str, path: str, epoch: int) -> GPTDataset:
        return self._epochs.open(key, path, epoch_seed(self._schedule.seed, key, epoch))


class ValidationDataset(Dataset[Sample]):
    """The first samples of a validation set, over again when more are asked for."""

    def __init__(self, path: str, info: DatasetInfo, seed: int, epochs: Epochs) -> None:
        self._epochs = epochs
        self._place = (info.key, path, epoch_seed(seed, info.key, 0))
        self._samples: GPTDataset | None = None

    def build_caches(self) -> None:
        """Make the sample index."""
        self._epochs.build(*self._place)

    def __getitem__(self, index: int) -> Sample:
        if self._samples is None:
            self._samples = self._epochs.open(*self._place)
        item: Sample = self._samples[index % len(self._samples)]
        return item


def blend_order(fold: FoldPlan) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset each sample of a fold comes from, and its number in the fold's slice.

    megatron-core's helper interleaves the datasets so that every prefix of the fold keeps to the
    blend, and uses each slice exactly once.
    """
    sizes = np.array([piece.samples for piece in fold.slices], dtype=np.int64)
    # The helper writes past the end of its arrays when a dataset's share is zero.
    present = np.flatnonzero(sizes)
    which = np.zeros(fold.samples, dtype=np.int16)
    position = np.zeros(fold.samples, dtype=np.int64)
    helpers_cpp.build_exhaustive_blending_indices(which, position, sizes[present], len(present))
    return present.astype(np.int16)[which], position
