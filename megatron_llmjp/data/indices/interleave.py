"""Order of a fold's datasets: megatron-core's rule, stored on disk, or the even interleaving.

The rule of megatron-core's helper takes the dataset with the largest deficit next. Its state after
n samples depends on all decisions before, so that the order is built once and cached. It belongs to
``shuffle: documents``; ``shuffle: blocks`` computes its order (``folds/even_interleave.py``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import megatron.core
import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers_cpp

from megatron_llmjp.data.folds.even_interleave import EvenInterleave
from megatron_llmjp.data.folds.schedule import FoldPlan
from megatron_llmjp.data.folds.schema import Shuffle
from megatron_llmjp.data.indices import index_cache


class DatasetOrder(Protocol):
    """Order of the datasets of a fold."""

    def locate(self, position: int) -> tuple[int, int]:
        """Return the dataset of a position of the fold, and the sample's number in its slice."""

    def positions(self, dataset: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions of samples of a dataset, by their numbers in its slice."""


def fold_order(shuffle: Shuffle, cache: Path, fold: FoldPlan) -> DatasetOrder:
    """Return the order of the datasets of a fold; a stored one that is missing is built."""
    if shuffle == "blocks":
        return EvenInterleave([dataset_slice.samples for dataset_slice in fold.slices])
    return FoldOrder(cache, fold).open()


class StoredOrder:
    """Order given by the dataset and the sample number of each position."""

    def __init__(self, which: np.ndarray, number: np.ndarray) -> None:
        self._which = which
        self._number = number

    def locate(self, position: int) -> tuple[int, int]:
        """Return the dataset of a position of the fold, and the sample's number in its slice."""
        return int(self._which[position]), int(self._number[position])

    def positions(self, dataset: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions of samples of a dataset, ascending."""
        return np.flatnonzero((self._which == dataset) & np.isin(self._number, numbers))


@dataclass(frozen=True)
class FoldOrder:
    """Interleaving of a fold's slices, in a folder named after their sizes."""

    cache: Path
    fold: FoldPlan

    @property
    def folder(self) -> Path:
        """Folder of the complete index."""
        sizes = json.dumps([dataset_slice.samples for dataset_slice in self.fold.slices])
        name = hashlib.sha256(sizes.encode()).hexdigest()[:32]
        return self.cache / f"order-{name}-core{megatron.core.__version__}"

    @property
    def build_cost(self) -> int:
        """Samples times datasets, each a hundredth of the cost of a shuffled entry."""
        return self.fold.samples * len(self.fold.slices) // 100

    def build(self, temporary: Path) -> None:
        """Write the index into an existing, empty folder."""
        dataset_numbers, sample_numbers = blend_order(self.fold)
        small = np.int32 if self.fold.samples <= np.iinfo(np.int32).max else np.int64
        np.save(temporary / "which.npy", dataset_numbers)
        np.save(temporary / "position.npy", sample_numbers.astype(small))

    def open(self) -> StoredOrder:
        """Return the order, memory-mapped; build it if it is missing."""
        return StoredOrder(*index_cache.open_index(self, self._load, (ValueError,)))

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        names = ("which.npy", "position.npy")
        dataset_numbers, sample_numbers = (
            np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in names
        )
        if (
            dataset_numbers.shape != (self.fold.samples,)
            or sample_numbers.shape != dataset_numbers.shape
        ):
            raise ValueError(
                f"its arrays do not have the {self.fold.samples:,} samples of the fold"
            )
        return dataset_numbers, sample_numbers


def blend_order(fold: FoldPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return the dataset of each sample of a fold, and its number in the dataset's slice.

    megatron-core's helper interleaves the datasets so that every prefix of the fold follows the
    blend and each sample of each slice is used exactly once.

    Returns:
        Dataset numbers (int16) and sample numbers (int64), each ``[samples of the fold]``.
    """
    sizes = np.array([dataset_slice.samples for dataset_slice in fold.slices], dtype=np.int64)
    # The helper writes past the end of its arrays if a dataset has no samples.
    present = np.flatnonzero(sizes)
    dataset_numbers = np.zeros(fold.samples, dtype=np.int16)
    sample_numbers = np.zeros(fold.samples, dtype=np.int64)
    helpers_cpp.build_exhaustive_blending_indices(
        dataset_numbers, sample_numbers, sizes[present], len(present)
    )
    return present.astype(np.int16)[dataset_numbers], sample_numbers
