"""Indices of single epochs: which tokens each sample of one epoch of one dataset holds.

One GPTDataset is exactly one epoch of one dataset. megatron-core builds its index, in a folder of
our cache; its own cache is written in place and ignores contents.
"""

from __future__ import annotations

import pickle
import resource
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
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

_PLAIN = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
OPEN_DATASETS = 256
"""Datasets kept open: more than a fold has as a rule."""


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


@dataclass(frozen=True)
class EpochIndex:
    """The index of one epoch of a dataset, in a folder named by all that decides it."""

    cache: Path
    path: str
    key: str
    """Of the dataset's contents."""
    seed: int
    sequence_length: int

    @property
    def folder(self) -> Path:
        """Where it lies when it is whole."""
        version = megatron.core.__version__
        name = f"{self.key}-{self.sequence_length}-{self.seed:08x}-core{version}"
        return self.cache / name

    @property
    def work(self) -> int:
        """Documents and samples that are shuffled."""
        index = indexed_dataset.read_index(self.path)
        tokens = indexed_dataset.bin_path(self.path).stat().st_size // index.dtype.itemsize
        return index.sequences + tokens // self.sequence_length

    def build(self, temporary: Path) -> None:
        """Write it into an existing, empty folder.

        megatron-core builds on the first rank only, so ranks of a process group leave the work to
        a process beside them.
        """
        if dist.is_available() and dist.is_initialized():
            build_in_subprocess(self, temporary)
            return
        tokens = indexed_dataset.open_indexed_dataset(self.path)
        documents = np.arange(len(tokens), dtype=np.int32)
        flags = dict.fromkeys(
            ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False
        )
        _dataset(self, tokens, temporary, documents, DatasetTokenizer(0, 1), flags)


class EpochDatasets:
    """Opens epochs of datasets, whose indices are cached on disk under their contents."""

    def __init__(
        self, data: DataConfig, tokenizer: Any, cache: Path, vocab_size: int | None = None
    ) -> None:
        """Open with the run's settings; ids from ``vocab_size`` on are refused if it is given."""
        self.vocab_size = vocab_size
        self.sequence_length = data.seq_length
        self.flags = {
            "reset_position_ids": data.reset_position_ids,
            "reset_attention_mask": data.reset_attention_mask,
            "eod_mask_loss": data.eod_mask_loss,
        }
        self.tokenizer = DatasetTokenizer(tokenizer.eod_id, tokenizer.vocab_size)
        self.cache = cache
        _allow_open_files()
        # Epochs of a dataset share its file handles.
        self._tokens = lru_cache(maxsize=OPEN_DATASETS)(indexed_dataset.open_indexed_dataset)

    def index(self, key: str, path: str, seed: int) -> EpochIndex:
        """What :meth:`open` will need."""
        return EpochIndex(self.cache, path, key, seed, self.sequence_length)

    def build(self, key: str, path: str, seed: int) -> None:
        """Make the cache of an epoch, unless another process does or did."""
        index = self.index(key, path, seed)
        index_cache.ensure_index(index.folder, index.build)

    def open(self, key: str, path: str, seed: int) -> GPTDataset:
        """One epoch, from its cache; memory-mapped, so that all processes of a machine share it.

        A cache that is missing or damaged is made again, in whichever process finds that.
        """
        index = self.index(key, path, seed)
        index_cache.ensure_index(index.folder, index.build)
        inode = index.folder.stat().st_ino
        tokens = self._tokens(path)
        try:
            return self._open(index, tokens)
        except (ValueError, IndexError, EOFError, pickle.UnpicklingError) as error:
            index_cache.discard_damaged(index.folder, inode, str(error))
            index_cache.ensure_index(index.folder, index.build)
            return self._open(index, tokens)

    def _open(self, index: EpochIndex, tokens: Any) -> GPTDataset:
        # The documents' numbers serve to build an index only: 4 bytes each that nobody needs here.
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
        create_attention_mask=flags["reset_attention_mask"],
        **flags,
    )
    # The description becomes the cache's file name: leave the path out of it, as the folder's
    # name says which contents these are.
    return GPTDataset(tokens, "", documents, None, Split.train, config)


def _check_ranges(data: GPTDataset, documents: int) -> None:
    """Raise ValueError if the arrays of an index do not fit each other; reads a few pages."""
    ends = data.sample_index[[0, -1]]
    fits = (
        len(data.document_index) == documents
        and len(data.shuffle_index) == len(data.sample_index) - 1
        and ends[0].tolist() == [0, 0]
        and 0 <= ends[1, 0] < documents
        and int(data.shuffle_index[-1]) < len(data.shuffle_index)
    )
    if not fits:
        raise ValueError("its arrays do not fit each other")


def _allow_open_files() -> None:
    """Lift the soft limit, often 1,024: a memory map keeps its file open, three of an epoch and
    three of its dataset.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
