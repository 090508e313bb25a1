"""Samples in Megatron-LM's own order, through megatron-core's builder of blended datasets.

The order of Megatron-LM is one of the whole run: it depends on the number of samples asked for, on
all weights and on the split. So it is built whole and cannot go on where another fold stopped; it
is there to take over a Megatron-LM run in the middle, sample for sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
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
from megatron_llmjp.data.indices.epoch_index import DatasetTokenizer, EpochDatasets
from megatron_llmjp.data.indices.worker import build_in_subprocess

_PLAIN = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}


@dataclass(frozen=True)
class MegatronIndex:
    """All index files of a blend in Megatron-LM's order, in a folder named by what decides it."""

    cache: Path
    blend: MegatronBlend
    sequence_length: int

    @property
    def folder(self) -> Path:
        """Where it lies when it is whole.

        The paths are part of the name, as megatron-core names its files by them.
        """
        content = json.dumps([*astuple(self.blend), self.sequence_length])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        return self.cache / f"megatron-{name}-core{megatron.core.__version__}"

    @property
    def work(self) -> int:
        """Samples that are shuffled and blended."""
        return self.blend.samples * max(1, len(self.blend.paths) // 10)

    def build(self, temporary: Path) -> None:
        """Write it into an existing, empty folder; from a process of its own inside a group."""
        if dist.is_available() and dist.is_initialized():
            build_in_subprocess(self, temporary)
            return
        with _world_of_one():  # BlendedDataset asks for its rank when it writes
            _dataset(self, temporary, DatasetTokenizer(0, 1), _PLAIN)

    def open(self, epochs: EpochDatasets) -> MegatronSamples:
        """The samples, memory-mapped; their index is made first where it is missing."""
        index_cache.ensure_index(self.folder, self.build)
        return MegatronSamples(_dataset(self, self.folder, epochs.tokenizer, epochs.flags))


class MegatronSamples:
    """The samples of a blend as Megatron-LM would number them."""

    def __init__(self, data: BlendedDataset | GPTDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: int) -> Any:
        _, data, inside = self.source(number)
        return data[inside]

    @property
    def datasets(self) -> list[GPTDataset]:
        """Those that are blended, in the blend's order."""
        return [self._data] if isinstance(self._data, GPTDataset) else list(self._data.datasets)

    def numbers(self, place: int, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the samples that are one of ``wanted`` in dataset ``place``, ascending."""
        if isinstance(self._data, GPTDataset):
            return np.sort(wanted)
        mine = self._data.dataset_index == place
        return np.flatnonzero(mine & np.isin(self._data.dataset_sample_index, wanted))

    def source(self, number: int) -> tuple[int, GPTDataset, int]:
        """Where a sample comes from.

        Returns:
            The place of its dataset in the blend, that dataset, and the sample's number in it.
        """
        if isinstance(self._data, GPTDataset):
            return 0, self._data, number
        place = int(self._data.dataset_index[number])
        return place, self._data.datasets[place], int(self._data.dataset_sample_index[number])


def megatron_index(blend: MegatronBlend, epochs: EpochDatasets) -> MegatronIndex:
    """Where the indices of a blend lie."""
    return MegatronIndex(epochs.cache, blend, epochs.sequence_length)


class _Builder(BlendedMegatronDatasetBuilder):
    """Without barriers: only ranks that read data open it, and each finds the files there."""

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any
    ) -> Any:
        return cls(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[list[Any]]
    ) -> list[list[Any]]:
        pairs = zip(prefixes, sizes_per_dataset, strict=True)
        by_prefix = [self._build_megatron_dataset_splits(p, split, s, False) for p, s in pairs]
        return [list(datasets) for datasets in zip(*by_prefix, strict=True)]


def _dataset(
    index: MegatronIndex, folder: Path, tokenizer: DatasetTokenizer, flags: dict[str, bool]
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
        create_attention_mask=flags["reset_attention_mask"],
        **where,
        **flags,
    )
    if config.split_matrix is not None:  # the other parts are none of this dataset's business
        config.split_matrix = [
            ends if i == part else None for i, ends in enumerate(config.split_matrix)
        ]
    sizes = [blend.samples if s.value == part else 0 for s in Split]
    return _Builder(GPTDataset, sizes, lambda: True, config).build()[part]


@contextmanager
def _world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
