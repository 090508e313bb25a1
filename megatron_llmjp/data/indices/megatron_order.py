"""Sample index in Megatron-LM's order, built by megatron-core's blended dataset builder.

Megatron-LM's order is determined for the whole run: it depends on the requested number of samples,
on all weights and on the split. It is therefore built as a whole and cannot continue where another
fold stopped. It serves to continue a Megatron-LM run from any iteration, sample for sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_llmjp.data.folds.schedule import MegatronBlend
from megatron_llmjp.data.indices import index_cache
from megatron_llmjp.data.indices.epoch_index import (
    NO_RESETS,
    DatasetTokenizer,
    EpochDatasets,
    read_on_demand,
)
from megatron_llmjp.data.indices.worker import build_in_subprocess
from megatron_llmjp.data.open_files import OpenFiles
from megatron_llmjp.data.token_reader import TokenReader


@dataclass(frozen=True)
class MegatronIndex:
    """Index of a blend in Megatron-LM's order, in a folder named after everything it depends on."""

    cache: Path
    blend: MegatronBlend
    sequence_length: int

    @property
    def folder(self) -> Path:
        """Folder of the complete index.

        Its name depends on the datasets' paths, because megatron-core's file names do.
        """
        content = json.dumps([*astuple(self.blend), self.sequence_length])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        return self.cache / f"megatron-{name}-core{megatron.core.__version__}"

    @property
    def build_cost(self) -> int:
        """Number of samples to shuffle and blend."""
        return self.blend.samples * max(1, len(self.blend.paths) // 10)

    def build(self, temporary: Path) -> None:
        """Write the index into an empty folder; within a process group, in a subprocess."""
        if dist.is_available() and dist.is_initialized():
            build_in_subprocess(self, temporary)
            return
        reader = partial(TokenReader, files=OpenFiles())
        with _single_process_group():  # BlendedDataset queries its rank when it writes
            _dataset(self, temporary, DatasetTokenizer(0, 1), NO_RESETS, reader)

    def open(self, epochs: EpochDatasets) -> MegatronSamples:
        """Return the samples, which are read on demand; build the index if it is missing."""
        index_cache.ensure_index(self.folder, self.build)
        settings = epochs.tokenizer, epochs.flags
        return MegatronSamples(_dataset(self, self.folder, *settings, epochs.reader))


class MegatronSamples:
    """Samples of a blend with Megatron-LM's numbering."""

    def __init__(self, data: BlendedDataset | GPTDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: int) -> Any:
        _, data, inside = self.source(number)
        return data[inside]

    @property
    def datasets(self) -> list[GPTDataset]:
        """The blended datasets, in the order of the blend."""
        return [self._data] if isinstance(self._data, GPTDataset) else list(self._data.datasets)

    def numbers(self, place: int, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers of samples that are in ``wanted`` of dataset ``place``, ascending."""
        if isinstance(self._data, GPTDataset):
            return np.sort(wanted)
        mine = self._data.dataset_index == place
        return np.flatnonzero(mine & np.isin(self._data.dataset_sample_index, wanted))

    def source(self, number: int) -> tuple[int, GPTDataset, int]:
        """Locate a sample.

        Returns:
            Position of its dataset in the blend, the dataset, and the sample's number in it.
        """
        if isinstance(self._data, GPTDataset):
            return 0, self._data, number
        place = int(self._data.dataset_index[number])
        return place, self._data.datasets[place], int(self._data.dataset_sample_index[number])


def megatron_index(blend: MegatronBlend, epochs: EpochDatasets) -> MegatronIndex:
    """Return the index of a blend."""
    return MegatronIndex(epochs.cache, blend, epochs.sequence_length)


class _Builder(BlendedMegatronDatasetBuilder):
    """Builder without barriers: only ranks that read data use it, and the files exist already.

    Each dataset is closed before the next one is opened: ``read_on_demand``.
    """

    def __init__(self, reader: Callable[[str], TokenReader], *args: Any) -> None:
        super().__init__(*args)
        self._reader = reader

    def build_generic_dataset(
        self, cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any
    ) -> Any:
        data = cls(*args)
        if not isinstance(data, GPTDataset):
            return data
        if not isinstance(data.sample_index, np.memmap):
            data = cls(*args)  # it was built just now: load it, which releases its memory
        read_on_demand(data, self._reader(data.dataset.path_prefix))
        return data

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[list[Any]]
    ) -> list[list[Any]]:
        pairs = zip(prefixes, sizes_per_dataset, strict=True)
        by_prefix = [self._build_megatron_dataset_splits(p, split, s, False) for p, s in pairs]
        return [list(datasets) for datasets in zip(*by_prefix, strict=True)]


def _dataset(
    index: MegatronIndex,
    folder: Path,
    tokenizer: DatasetTokenizer,
    flags: dict[str, bool],
    reader: Callable[[str], TokenReader],
) -> BlendedDataset | GPTDataset:
    blend = index.blend
    part = Split[blend.part].value
    content = (list(blend.paths), list(blend.weights) if blend.weights else None)
    where: dict[str, Any] = {"blend": content, "split": blend.split}
    if blend.split is None:
        where = {"blend_per_split": [content if s.value == part else None for s in Split]}
    config = GPTDatasetConfig(
        random_seed=blend.seed,
        sequence_length=index.sequence_length,
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        create_attention_mask=False,  # data/documents.py instead
        **where,
        **flags,
    )
    if config.split_matrix is not None:  # build this part only
        config.split_matrix = [
            ends if i == part else None for i, ends in enumerate(config.split_matrix)
        ]
    sizes = [blend.samples if s.value == part else 0 for s in Split]
    return _Builder(reader, GPTDataset, sizes, lambda: True, config).build()[part]


@contextmanager
def _single_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
