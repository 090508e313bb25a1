"""Epoch indices: named after dataset contents, and built before a fold needs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.folds.datasets import compute_keys, inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.data.indices import epoch_index, prefetch
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.index_cache import ensure_indices, find_damage
from megatron_llmjp.data.indices.prefetch import IndexPrefetcher
from megatron_llmjp.data.open_files import StoredArray
from megatron_llmjp.tokenizers import load_tokenizer
from tests.support.datasets import write_folds
from tests.support.timeouts import wait_until

LENGTH, BATCH = 16, 8


def write(prefix: Path, lengths: list[int]) -> tuple[str, str]:
    """Write a dataset with unique tokens; return its content key and its path."""
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.dtype(np.int32))
    writer.add(np.arange(sum(lengths), dtype=np.int32), np.array(lengths, np.int32))
    writer.finish(prefix.with_suffix(".idx"))
    writer.clean()
    return compute_keys(str(prefix)).key, str(prefix)


def lengths_of(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, 40).tolist()


def epochs_of(folder: Path, vocab_size: int = 99, **data) -> EpochDatasets:
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=vocab_size)
    return EpochDatasets(DataConfig(seq_length=LENGTH, **data), tokenizer, folder / "cache")


def samples(data) -> list[list[int]]:
    return [[*data[i]["tokens"].tolist(), int(data[i]["labels"][-1])] for i in range(len(data))]


def folds_of(folder: Path, iterations=(6, 5, 4)) -> FoldDataset:
    file = read_fold_file(write_folds(folder, iterations))
    model = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --global-batch-size"
    config = parse([*model.split(), str(BATCH)])[0]
    schedule = resolve_folds(file, inspect_datasets(file), LENGTH, BatchSizeSchedule(config))
    return FoldDataset(schedule, epochs_of(folder))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_other_contents_at_the_same_path_are_another_dataset(tmp_path):
    key, path = write(tmp_path / "a", lengths_of(3))
    old = samples(epochs_of(tmp_path).open(key, path, 1))
    after, _ = write(tmp_path / "a", lengths_of(3)[::-1])  # the same sizes of both files
    assert after != key
    new = samples(epochs_of(tmp_path).open(after, path, 1))
    assert sorted(new) != sorted(old)
    assert new == samples(epochs_of(tmp_path / "empty").open(after, path, 1))
    # Elsewhere, the same contents are the same dataset.
    for suffix in (".bin", ".idx"):
        (tmp_path / f"b{suffix}").write_bytes((tmp_path / f"a{suffix}").read_bytes())
    assert compute_keys(str(tmp_path / "b")).key == after


def test_a_complete_index_is_never_written_again(tmp_path):
    """megatron-core builds a missing index on rank 0 only, while the other ranks fail."""
    key, path = write(tmp_path / "a", lengths_of(3))
    epochs_of(tmp_path).open(key, path, 1)
    files = times(tmp_path / "cache")
    other = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    for epochs in (epochs_of(tmp_path, vocab_size=500), epochs_of(tmp_path, **other)):
        assert len(epochs.open(key, path, 1)) > 0
        assert times(tmp_path / "cache") == files


def damage_header(path: Path) -> None:
    """Overwrite the header of an array file."""
    with path.open("r+b") as stream:
        stream.write(b"\0" * 16)


def damage_values(path: Path) -> None:
    """Replace the values of an array."""
    array = np.load(path)
    np.save(path, np.full_like(array, 10**6))


def damage_type(path: Path) -> None:
    """Write an array of Python objects, which numpy would unpickle."""
    rewrite(path, np.array([{}] * 3, dtype=object))


def damage_kind(path: Path) -> None:
    """Write numbers of another type and the same size."""
    array = np.load(path)
    rewrite(path, array.astype(np.float32 if array.itemsize == 4 else np.float64))


def damage_length(path: Path) -> None:
    """Write an array that is shorter than its header states."""
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 4)


def rewrite(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


def list_as_they_are(folder: Path) -> None:
    """Update the list of files of a cache folder to their current sizes."""
    contents = folder / "contents.json"
    listed = json.loads(contents.read_text())
    for name, entry in listed["files"].items():
        entry[0] = (folder / name).stat().st_size
    contents.write_text(json.dumps(listed))


@pytest.mark.parametrize("damage", [damage_type, damage_kind, damage_length])
def test_invalid_arrays_are_replaced(tmp_path, capsys, damage):
    """For epoch indices and fold orders, also if the list of files matches the damaged array."""
    data = folds_of(tmp_path, (6, 5, 4))
    good = [data[i]["tokens"].tolist() for i in range(BATCH)]
    files = [*(tmp_path / "cache").rglob("*sample_index.npy")]
    files += (tmp_path / "cache").rglob("which.npy")
    for file in files:
        damage(file)
        list_as_they_are(file.parent)
    again = folds_of(tmp_path, (6, 5, 4))
    assert [again[i]["tokens"].tolist() for i in range(BATCH)] == good
    assert capsys.readouterr().err.count("rebuilding this index") >= 2


@pytest.mark.parametrize("damage", [damage_header, damage_values])
@pytest.mark.parametrize("which", ["sample_index", "shuffle_index"])
def test_damage_at_unchanged_size(tmp_path, capsys, damage, which):
    key, path = write(tmp_path / "a", lengths_of(3))
    good = samples(epochs_of(tmp_path).open(key, path, 1))
    (file,) = (tmp_path / "cache").rglob(f"*{which}.npy")
    size = file.stat().st_size
    damage(file)
    assert file.stat().st_size == size
    assert samples(epochs_of(tmp_path).open(key, path, 1)) == good
    assert "rebuilding this index" in capsys.readouterr().err


def test_epochs_of_a_dataset_share_its_files(tmp_path):
    key, path = write(tmp_path / "a", lengths_of(3))
    epochs = epochs_of(tmp_path)
    first, second = (epochs.open(key, path, seed) for seed in (1, 2))
    assert first.dataset is second.dataset
    one, other = (np.asarray(data.document_index) for data in (first, second))
    assert one.tolist() != other.tolist()
    for array in (first.document_index, first.sample_index, first.shuffle_index):
        assert isinstance(array, StoredArray)
        assert array.dtype.itemsize == 4
    assert first.indices.nbytes == 0


def test_changing_later_folds_keeps_earlier_indices(tmp_path):
    data = folds_of(tmp_path, (6, 5, 4))
    for fold in data.schedule.folds[:2]:
        ensure_indices(data.indices(fold))
    before = times(tmp_path / "cache")
    path = tmp_path / "folds.yaml"
    content = yaml.safe_load(path.read_text())
    content["folds"][2]["blend"]["ja"]["weight"] = 7
    content["folds"].append(content["folds"][1] | {"name": "new"})
    path.write_text(yaml.safe_dump(content))
    edited = folds_of(tmp_path, (6, 5, 9, 3))
    for fold in edited.schedule.folds[:2]:
        assert all(find_damage(index.folder) is None for index in edited.indices(fold))
        ensure_indices(edited.indices(fold), thorough=True)
    assert times(tmp_path / "cache") == before


def test_a_fold_is_built_before_it_starts(tmp_path, monkeypatch):
    """The first fold is built at once, the next in the background; small folds all at once."""
    data = folds_of(tmp_path, (2, 2, 2))
    first, second, third = data.schedule.folds
    logged: list[str] = []
    monkeypatch.setattr(prefetch, "MAX_INLINE_COST", -1)
    prefetcher = IndexPrefetcher(data, first_on_machine=True, log=logged.append)
    prefetcher.start(0, BATCH, [])
    assert not missing(data, first)
    assert missing(data, third)
    wait_until(lambda: not missing(data, second))
    wait_until(lambda: not [*(tmp_path / "cache").glob("*.lock")])  # it has finished
    files = times(tmp_path / "cache")
    other_rank = IndexPrefetcher(data, first_on_machine=False, log=logged.append)
    for consumed in (0, BATCH, BATCH + 1):  # the last batch reaches into the second fold
        other_rank.ensure_ready(consumed, BATCH)
    assert {p: t for p, t in times(tmp_path / "cache").items() if p in files} == files
    assert len(logged) == 1  # "building ..." at the start; no rank waited
    prefetcher.close()
    monkeypatch.undo()
    IndexPrefetcher(data, first_on_machine=True, log=logged.append).start(BATCH, BATCH, [])
    assert not missing(data, third)


def missing(data: FoldDataset, fold) -> bool:
    return any(find_damage(index.folder) is not None for index in data.indices(fold))


def test_inside_a_process_group(tmp_path, monkeypatch):
    """In a process group, ranks and DataLoader workers build missing indices in a subprocess."""
    data = folds_of(tmp_path, (2, 2))
    numbers = [0, BATCH, data.schedule.folds[1].first_sample]
    (tmp_path / "other").mkdir()
    expected = [folds_of(tmp_path / "other", (2, 2))[i]["tokens"].tolist() for i in numbers]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # Fails if an index is built in this process instead of a subprocess.
        monkeypatch.setattr(epoch_index, "_dataset", only_open(epoch_index._dataset))
        IndexPrefetcher(data, first_on_machine=True).ensure_ready(0, BATCH)
        assert not missing(data, data.schedule.folds[0])
        order, epoch, *_ = data.indices(data.schedule.folds[0])
        shutil.rmtree(order.folder)
        shutil.rmtree(epoch.folder)
        loader = DataLoader(data, batch_size=None, sampler=numbers, num_workers=1)
        assert [sample["tokens"].tolist() for sample in loader] == expected
    finally:
        dist.destroy_process_group()


def only_open(dataset):
    def function(index, tokens, folder, *rest):
        assert folder == index.folder
        return dataset(index, tokens, folder, *rest)

    return function
