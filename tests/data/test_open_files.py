"""A blend of many datasets is read through few open files, and without memory maps."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.open_files import MAX_OPEN_FILES, OpenFiles, StoredArray
from megatron_llmjp.errors import DataError
from megatron_llmjp.tokenizers import load_tokenizer
from tests.data.test_dataset import lengths_of, write_numbered

LENGTH, DATASETS = 16, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(DATASETS):
        write_numbered(folder / f"d{number}", lengths_of(number, 20), 1000 * number)
    return folder


def in_use(folder: Path) -> tuple[int, int]:
    """Return the number of open files and of maps of this process in a folder."""
    files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return tuple(sum(str(folder) in line for line in lines) for lines in (files, maps))


SETTINGS = {
    "blocks": ({"epochs": 1}, "blocks", 0),
    "documents": ({"epochs": 1}, "documents", 2),  # the maps of the stored interleaving
    "megatron": ({"order": "megatron", "samples": 900}, "documents", 2),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_few_files_and_maps(folder, tmp_path, case):
    fold, shuffle, maps = SETTINGS[case]
    blend = {f"d{n}": {"path": str(folder / f"d{n}")} for n in range(DATASETS)}
    if case == "megatron":
        blend = {name: {**source, "weight": 1, "repeat": True} for name, source in blend.items()}
    content = {"shuffle": shuffle, "folds": [{"name": "f", "blend": blend, **fold}]}
    (tmp_path / "folds.yaml").write_text(yaml.safe_dump(content))
    file = read_fold_file(tmp_path / "folds.yaml")
    sizes = BatchSizeSchedule(parse(["--config", "laptop-llama"])[0])
    schedule = resolve_folds(file, inspect_datasets(file), LENGTH, sizes)
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=99)
    epochs = EpochDatasets(DataConfig(seq_length=LENGTH), tokenizer, tmp_path / "cache")
    data = FoldDataset(schedule, epochs)
    gc.collect()  # of other tests
    read: set[str] = set()
    for number in range(0, len(data), 3):
        read.add(data.locate(number)[0].name)
        data[number]
    assert len(read) == DATASETS
    files, found = in_use(folder)
    more_files, more_maps = in_use(tmp_path)
    assert files + more_files <= MAX_OPEN_FILES + maps
    assert (found, more_maps) == (0, maps)


def test_an_array_in_a_file(tmp_path):
    array = np.arange(60, dtype=np.uint16).reshape(20, 3)
    np.save(tmp_path / "a.npy", array)
    files = OpenFiles(limit=2)
    stored = StoredArray.of(np.load(tmp_path / "a.npy", mmap_mode="r"), files)
    assert stored.shape == (20, 3) and len(stored) == 20 and stored.dtype == np.uint16
    assert stored[4].tolist() == [12, 13, 14] == stored[np.int64(4)].tolist()
    assert stored[-1].tolist() == array[-1].tolist()
    assert stored[3:7].tolist() == array[3:7].tolist() and len(stored[9:2]) == 0
    assert stored[np.array([5, 0])].tolist() == array[[5, 0]].tolist()
    assert (np.asarray(stored) == array).all()
    with pytest.raises(IndexError, match="element 20 of 20"):
        stored[20]


def test_files_are_opened_again(tmp_path):
    files = OpenFiles(limit=3)
    paths = [str(tmp_path / str(number)) for number in range(5)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(bytes([number] * 10))
    for _ in range(2):
        assert [files.read(path, 2, 1)[0] for path in paths] == [0, 1, 2, 3, 4]
    assert len(files) == 3
    files.close()
    assert files.read(paths[0], 0, 10) == bytes(10) and len(files) == 1


def test_missing_bytes_are_named(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    files = OpenFiles()
    with pytest.raises(DataError, match=r"a: 4 bytes at byte 1 were expected, found 2. The file"):
        files.read(str(tmp_path / "a"), 1, 4)
    for offset, size in ((-1, 2), (0, -1), (2**63, 1)):
        with pytest.raises(DataError, match=r"a: cannot read"):
            files.read(str(tmp_path / "a"), offset, size)
    with pytest.raises(DataError, match=r"b: cannot read 1 bytes at 0: .*No such file"):
        files.read(str(tmp_path / "b"), 0, 1)
