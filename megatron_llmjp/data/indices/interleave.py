"""Which dataset each sample of a fold comes from, cached: all processes of a machine share it."""

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
    """The interleaving of a fold's slices, in a folder named by their sizes."""

    cache: Path
    fold: FoldPlan

    @property
    def folder(self) -> Path:
        """Where it lies when it is whole."""
        sizes = json.dumps([piece.samples for piece in self.fold.slices])
        name = hashlib.sha256(sizes.encode()).hexdigest()[:32]
        return self.cache / f"order-{name}-core{megatron.core.__version__}"

    @property
    def work(self) -> int:
        """Samples times datasets, each a hundredth of an entry that is shuffled."""
        return self.fold.samples * len(self.fold.slices) // 100

    def build(self, temporary: Path) -> None:
        """Write it into an existing, empty folder."""
        which, position = blend_order(self.fold)
        small = np.int32 if self.fold.samples <= np.iinfo(np.int32).max else np.int64
        np.save(temporary / "which.npy", which)
        np.save(temporary / "position.npy", position.astype(small))

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        """As :func:`blend_order`, memory-mapped; made first where it is missing."""
        index_cache.ensure_index(self.folder, self.build)
        inode = self.folder.stat().st_ino
        try:
            return self._load()
        except ValueError as error:
            index_cache.discard_damaged(self.folder, inode, str(error))
            index_cache.ensure_index(self.folder, self.build)
            return self._load()

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        names = ("which.npy", "position.npy")
        which, position = (
            np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in names
        )
        if which.shape != (self.fold.samples,) or position.shape != which.shape:
            raise ValueError(
                f"its arrays do not hold the {self.fold.samples:,} samples of the fold"
            )
        return which, position


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
