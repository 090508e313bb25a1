"""Interleaving of a fold's datasets, cached on disk and shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import megatron.core
import numpy as np
from megatron.core.datasets import helpers_cpp

from megatron_llmjp.data.folds.schedule import FoldPlan
from megatron_llmjp.data.indices import index_cache


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

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the arrays of :func:`blend_order`, memory-mapped; build them if missing."""
        return index_cache.open_index(self, self._load, (ValueError,))

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
