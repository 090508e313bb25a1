"""Epochs of datasets: megatron-core's stored sample indices, or the computed block-wise shuffle.

Each epoch of each dataset is a megatron-core ``GPTDataset``. Its index with ``shuffle: documents``
is built by megatron-core in a folder of this package's cache: its own cache is written in place and
does not depend on the datasets' contents. An epoch with ``shuffle: blocks`` (``block_shuffle.py``)
stores nothing.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data import indexed_dataset
from megatron_llmjp.data.block_tokens import BlockTokens, count_block_tokens
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.folds.schema import Shuffle
from megatron_llmjp.data.indices import index_cache
from megatron_llmjp.data.indices.block_shuffle import BlockShuffledEpoch
from megatron_llmjp.data.indices.worker import build_in_subprocess
from megatron_llmjp.data.open_files import OpenFiles, StoredArray
from megatron_llmjp.data.token_reader import TokenReader

NO_RESETS = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
OPEN_DATASETS = 1024
"""Number of datasets of which the properties are kept; their files are not kept open."""


class DatasetTokenizer:
    """Minimal tokenizer interface required by megatron-core's datasets."""

    pad = -1
    """No token is padding, because all samples are full."""

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.special_tokens_dict: dict[str, int] = {"eod": eod}
        # Part of megatron-core's cache file names; the order does not depend on the tokenizer.
        self.unique_identifiers: OrderedDict[str, int] = OrderedDict()


@dataclass(frozen=True)
class EpochIndex:
    """Index of one epoch of a dataset, in a folder named after everything that determines it."""

    cache: Path
    path: str
    key: str
    """Content digest of the dataset."""
    seed: int
    sequence_length: int

    @property
    def folder(self) -> Path:
        """Folder of the complete index."""
        version = megatron.core.__version__
        name = f"{self.key}-{self.sequence_length}-{self.seed:08x}-core{version}"
        return self.cache / name

    @property
    def build_cost(self) -> int:
        """Number of documents and samples to shuffle."""
        index = indexed_dataset.read_index(self.path)
        tokens = indexed_dataset.bin_path(self.path).stat().st_size // index.dtype.itemsize
        return index.sequences + tokens // self.sequence_length

    def build(self, temporary: Path) -> None:
        """Write the index into an existing, empty folder.

        megatron-core builds only on the first rank of a process group, so a rank within a group
        builds in a subprocess.
        """
        if dist.is_available() and dist.is_initialized():
            build_in_subprocess(self, temporary)
            return
        tokens = indexed_dataset.open_indexed_dataset(self.path)
        documents = np.arange(len(tokens), dtype=np.int32)
        _dataset(self, tokens, temporary, documents, DatasetTokenizer(0, 1), NO_RESETS)


class EpochDatasets:
    """Opens epochs of datasets, whose indices are cached on disk by content digest."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        cache: Path,
        vocab_size: int | None = None,
        datasets: Mapping[str, DatasetInfo] | None = None,
    ) -> None:
        """Use the run's data settings.

        Args:
            data: the settings.
            tokenizer: gives the end-of-document token and the vocabulary size.
            cache: folder of the stored indices.
            vocab_size: token ids must be below, if it is given.
            datasets: facts about the datasets, by path; others are read when they are opened.
        """
        self.vocab_size = vocab_size
        self.sequence_length = data.seq_length
        self.flags = {
            **NO_RESETS,
            "reset_position_ids": data.reset_position_ids,
            "eod_mask_loss": data.eod_mask_loss,
        }
        self.tokenizer = DatasetTokenizer(tokenizer.eod_id, tokenizer.vocab_size)
        self.restricts_attention = data.reset_attention_mask
        self.cache = cache
        self.files = OpenFiles()
        self._datasets = datasets or {}
        self._reader = lru_cache(maxsize=OPEN_DATASETS)(partial(TokenReader, files=self.files))
        self._block_tokens = lru_cache(maxsize=OPEN_DATASETS)(self._find_block_tokens)

    def index(self, key: str, path: str, seed: int) -> EpochIndex:
        """Return the index that :meth:`open` requires."""
        return EpochIndex(self.cache, path, key, seed, self.sequence_length)

    def open(self, key: str, path: str, seed: int, shuffle: Shuffle = "documents") -> GPTDataset:
        """Open one epoch, of which indices and tokens are read on demand.

        A stored index that is missing or damaged is built again by the process that finds it so.
        """
        index = self.index(key, path, seed)
        if shuffle == "blocks":
            settings = _settings(index, self.cache, self.tokenizer, self.flags)
            blocks = self._block_tokens(path)
            return BlockShuffledEpoch(self._reader(path), blocks, seed, settings)
        damage = (ValueError, IndexError, EOFError, pickle.UnpicklingError)
        return index_cache.open_index(index, partial(self._open, index), damage)

    def reader(self, path: str) -> TokenReader:
        """Return the reader of a dataset, which all of its epochs share."""
        return self._reader(path)

    def _open(self, index: EpochIndex) -> GPTDataset:
        reader, nothing = self._reader(index.path), np.empty(0, np.int32)
        data = _dataset(index, reader, index.folder, nothing, self.tokenizer, self.flags)
        _check_ranges(data, len(reader))
        read_on_demand(data, reader)
        return data

    def _find_block_tokens(self, path: str) -> BlockTokens:
        info = self._datasets.get(path)
        if info is not None and info.block_tokens is not None:
            return info.block_tokens
        return count_block_tokens(indexed_dataset.read_index(path))


def read_on_demand(data: GPTDataset, reader: TokenReader) -> None:
    """Replace the memory maps of a GPTDataset by reads through a few open files."""
    for name in ("document_index", "sample_index", "shuffle_index"):
        setattr(data, name, StoredArray.of(getattr(data, name), reader.files))
    data.dataset = reader
    data.indices = np.empty(0, np.int32)  # 4 bytes per document, for building only


def _dataset(
    index: EpochIndex,
    tokens: Any,
    folder: Path,
    documents: np.ndarray,
    tokenizer: DatasetTokenizer,
    flags: dict[str, bool],
) -> GPTDataset:
    config = _settings(index, folder, tokenizer, flags)
    # The description is part of megatron-core's cache file names; the path is omitted from it
    # because the folder's name identifies the contents.
    return GPTDataset(tokens, "", documents, None, Split.train, config)


def _settings(
    index: EpochIndex, folder: Path, tokenizer: DatasetTokenizer, flags: dict[str, bool]
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=index.seed,
        sequence_length=index.sequence_length,
        blend=([index.path], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        create_attention_mask=False,  # data/documents.py instead
        **flags,
    )


def _check_ranges(data: GPTDataset, documents: int) -> None:
    """Raise ValueError if the arrays of an index are inconsistent; reads a few pages."""
    ends = data.sample_index[[0, -1]]
    fits = (
        len(data.document_index) == documents
        and len(data.shuffle_index) == len(data.sample_index) - 1
        and ends[0].tolist() == [0, 0]
        and 0 <= ends[1, 0] < documents
        and int(data.shuffle_index[-1]) < len(data.shuffle_index)
    )
    if not fits:
        raise ValueError("its arrays are inconsistent")
