"""Fold schedule -> samples, through megatron-core's GPTDataset.

One GPTDataset is exactly one epoch of one dataset. megatron-core's blended datasets are not used:
they draw 0.5 % more samples than asked for, and number their samples anew when a blend changes.
"""

from __future__ import annotations

import fcntl
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data import indexed
from megatron_llmjp.data.folds import DatasetInfo, FoldPlan, Schedule, Slice, epoch_seed
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    import megatron.core
    from megatron.core.datasets import helpers_cpp
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

Sample = dict[str, torch.Tensor]


class Epochs:
    """Opens epochs of datasets; their sample indices are cached on disk under their contents.

    A cache folder appears under its name when it is complete, so that a killed process leaves no
    half-written index behind; megatron-core's own cache is written in place and ignores contents.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, cache: Path) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._cache = cache

    def build(self, key: str, path: str, seed: int) -> None:
        """Make the cache of an epoch, unless another process does or did.

        megatron-core builds indices on rank 0 only: call this before process groups exist.
        """
        folder = self._folder(key, seed)
        if folder.is_dir():
            return
        with _lock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():
                return
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            self._open(path, seed, temporary)
            temporary.replace(folder)

    def open(self, key: str, path: str, seed: int) -> GPTDataset:
        """One epoch, from its cache."""
        return self._open(path, seed, self._folder(key, seed))

    def _folder(self, key: str, seed: int) -> Path:
        name = f"{key}-{self._data.seq_length}-{seed:08x}-core{megatron.core.__version__}"
        return self._cache / name

    def _open(self, path: str, seed: int, folder: Path) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self._data.seq_length,
            blend=([path], None),
            split="1,0,0",
            path_to_cache=str(folder),
            tokenizer=DatasetTokenizer(self._tokenizer.eod_id, self._tokenizer.vocab_size),
            reset_position_ids=self._data.reset_position_ids,
            reset_attention_mask=self._data.reset_attention_mask,
            eod_mask_loss=self._data.eod_mask_loss,
            create_attention_mask=self._data.reset_attention_mask,
        )
        tokens = indexed.open_indexed(path)
        documents = np.arange(len(tokens), dtype=np.int32)
        # The description becomes the cache's file name: leave the path out of it, as the folder's
        # name says which contents these are.
        return GPTDataset(tokens, "", documents, None, Split.train, config)


class DatasetTokenizer:
    """The little that megatron-core's datasets ask of a tokenizer."""

    pad = -1
    """No token is padding: all samples are full."""

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.special_tokens_dict: dict[str, int] = {"eod": eod}
        # Part of the cache's file names: an order of samples does not depend on a tokenizer.
        self.unique_identifiers: OrderedDict[str, int] = OrderedDict()


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


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
