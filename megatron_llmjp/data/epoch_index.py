"""Indices of single epochs: which tokens each sample of one epoch of one dataset holds.

One GPTDataset is exactly one epoch of one dataset. Its index is cached on disk.
"""

from __future__ import annotations

import fcntl
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data import indexed
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    import megatron.core
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split


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


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
