"""Sample index of one epoch of one dataset, which maps samples to tokens.

Each epoch of each dataset is a megatron-core ``GPTDataset``. megatron-core builds the index in a
folder of this package's cache: its own cache is written in place and does not depend on the
datasets' contents.
"""

from __future__ import annotations

import pickle
import resource
from collections import OrderedDict
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
from megatron_llmjp.data.indices import index_cache
from megatron_llmjp.data.indices.worker import build_in_subprocess

NO_RESETS = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
OPEN_DATASETS = 256
"""Number of datasets kept open: more than most folds have."""


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
        self, data: DataConfig, tokenizer: Any, cache: Path, vocab_size: int | None = None
    ) -> None:
        """Use the run's data settings; token ids must be below ``vocab_size`` if it is given."""
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
        _allow_open_files()
        # All epochs of a dataset share its file handles.
        self._tokens = lru_cache(maxsize=OPEN_DATASETS)(indexed_dataset.open_indexed_dataset)

    def index(self, key: str, path: str, seed: int) -> EpochIndex:
        """Return the index that :meth:`open` requires."""
        return EpochIndex(self.cache, path, key, seed, self.sequence_length)

    def open(self, key: str, path: str, seed: int) -> GPTDataset:
        """Open one epoch, memory-mapped so that all processes of a machine share its index.

        An index that is missing or damaged is built again by the process that finds it so.
        """
        index, tokens = self.index(key, path, seed), self._tokens(path)
        damage = (ValueError, IndexError, EOFError, pickle.UnpicklingError)
        return index_cache.open_index(index, partial(self._open, index, tokens), damage)

    def _open(self, index: EpochIndex, tokens: Any) -> GPTDataset:
        # Document numbers (4 bytes each) are required only for building an index.
        nothing = np.empty(0, np.int32)
        data = _dataset(index, tokens, index.folder, nothing, self.tokenizer, self.flags)
        _check_ranges(data, len(tokens))
        return data


def _dataset(
    index: EpochIndex,
    tokens: Any,
    folder: Path,
    documents: np.ndarray,
    tokenizer: DatasetTokenizer,
    flags: dict[str, bool],
) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=index.seed,
        sequence_length=index.sequence_length,
        blend=([index.path], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        create_attention_mask=False,  # data/documents.py instead
        **flags,
    )
    # The description is part of megatron-core's cache file names; the path is omitted from it
    # because the folder's name identifies the contents.
    return GPTDataset(tokens, "", documents, None, Split.train, config)


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


def _allow_open_files() -> None:
    """Raise the soft limit on open files (often 1,024) to the hard limit.

    Memory maps keep their files open: three per epoch and three per dataset.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
