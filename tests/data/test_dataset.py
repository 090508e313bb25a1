"""Samples of the fold schedule, compared with megatron-core's GPTDataset."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataloader import MicroBatchSampler
from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.folds.schedule import DatasetSlice, FoldPlan, HeldOutDataset, epoch_seed
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.data.indices.epoch_index import DatasetTokenizer, EpochDatasets
from megatron_llmjp.data.indices.interleave import blend_order
from megatron_llmjp.errors import DataError
from megatron_llmjp.tokenizers import load_tokenizer

LENGTH, BATCH = 16, 8
BATCHES = BatchSizeSchedule(
    parse(["--config", "laptop-llama", "--global-batch-size", str(BATCH)])[0]
)


def write_numbered(prefix: Path, lengths: list[int], first: int) -> None:
    """Write a dataset with unique tokens, so that each one can be located."""
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.dtype(np.int32))
    tokens = np.arange(first, first + sum(lengths), dtype=np.int32)
    writer.add(tokens, np.array(lengths, np.int32))
    writer.finish(prefix.with_suffix(".idx"))
    writer.clean()


def lengths_of(seed: int, documents: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, documents).tolist()


SIZES = {"a": 30, "b": 45, "c": 9}
"""Number of documents of each dataset."""
FOLDS = [
    {"name": "whole", "epochs": 1, "blend": {"a": {"path": "a"}, "b": {"path": "b"}}},
    {"name": "again", "tokens": 70 * LENGTH, "blend": {
        "a": {"path": "a", "weight": 3, "repeat": True},
        "c": {"path": "c", "weight": 1, "repeat": True},
    }},
    {"name": "more", "blend": {"a": {"path": "a", "epochs": 2.5, "repeat": True}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i, (name, documents) in enumerate(SIZES.items()):
        write_numbered(folder / name, lengths_of(i, documents), 10_000 * i)
    (folder / "folds.yaml").write_text(yaml.safe_dump({"seed": 5, "folds": FOLDS}))
    return folder


def epochs_of(folder: Path, vocab_size: int = 99, **data) -> EpochDatasets:
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=vocab_size)
    return EpochDatasets(DataConfig(seq_length=LENGTH, **data), tokenizer, folder / "cache")


def schedule_of(folder: Path, name: str = "folds.yaml"):
    file = read_fold_file(folder / name)
    return resolve_folds(file, inspect_datasets(file), LENGTH, BATCHES)


@pytest.fixture(scope="module")
def run(folder):
    data = FoldDataset(schedule_of(folder), epochs_of(folder))
    return data


def megatrons_epoch(path: str, seed: int, cache: Path) -> list[tuple[int, ...]]:
    """Return the tokens and last label of each sample of one epoch, by megatron-core alone."""
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=LENGTH, blend=([path], None), split="1,0,0",
        path_to_cache=str(cache), tokenizer=DatasetTokenizer(0, 99), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    tokens = IndexedDataset(path)
    data = GPTDataset(
        tokens, path, np.arange(len(tokens), dtype=np.int32), None, Split.train, config
    )
    return [plain(data[i]) for i in range(len(data))]


def plain(sample) -> tuple[int, ...]:
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    return (*sample["tokens"].tolist(), int(sample["labels"][-1]))


def test_an_epoch_equals_megatron_core_and_uses_each_sample_once(run, folder, tmp_path):
    schedule = schedule_of(folder)
    fold = schedule.folds[0]
    drawn = {piece.name: [] for piece in fold.slices}
    for i in range(fold.samples):
        drawn[run.locate(i)[0].name].append(plain(run[i]))
    for piece in fold.slices:
        seed = epoch_seed(schedule.seed, piece.key, 0)
        assert drawn[piece.name] == megatrons_epoch(piece.path, seed, tmp_path)
        seen = Counter(token for sample in drawn[piece.name] for token in sample[:-1])
        tokens = sum(lengths_of("abc".index(piece.name), SIZES[piece.name]))
        assert set(seen.values()) == {1}
        assert len(seen) == (tokens - 1) // LENGTH * LENGTH > tokens - 1 - LENGTH


def test_a_dataset_split_over_folds_is_used_exactly_once(folder):
    """Three folds with different blends together use one epoch of each dataset."""
    sizes = {name: sum(lengths_of(i, n)) for i, (name, n) in enumerate(SIZES.items())}
    per_epoch = {name: (size - 1) // LENGTH for name, size in sizes.items()}
    folds = []
    for number, share in enumerate((0.31, 0.25, None)):
        blend = {}
        for name, size in per_epoch.items():
            drawn = sum(int(size * other) for other in (0.31, 0.25))
            samples = int(size * share) if share else size - drawn
            blend[name] = {"path": name, "tokens": samples * LENGTH}
        folds.append({"name": f"part{number}", "blend": blend})
    (folder / "cut.yaml").write_text(yaml.safe_dump({"seed": 5, "folds": folds}))
    data = FoldDataset(schedule_of(folder, "cut.yaml"), epochs_of(folder))
    seen = Counter(token for i in range(len(data)) for token in plain(data[i])[:-1])
    assert set(seen.values()) == {1}
    assert len(seen) == sum(per_epoch.values()) * LENGTH
    # Unused: a partial sample at the end of each epoch, and its last token, which is only a label.
    assert sum(sizes.values()) - len(seen) <= len(sizes) * LENGTH


def test_restart_starts_a_new_epoch(folder):
    blend = {"a": {"path": "a", "weight": 1}}
    again = {"a": {"path": "a", "weight": 1, "restart": True}}
    folds = [
        {"name": "some", "samples": 20, "blend": blend},
        {"name": "anew", "samples": 30, "blend": again},
    ]
    (folder / "anew.yaml").write_text(yaml.safe_dump({"seed": 5, "folds": folds}))
    schedule = schedule_of(folder, "anew.yaml")
    assert schedule.folds[1].slices[0].start == schedule.folds[1].slices[0].samples_per_epoch
    data = FoldDataset(schedule, epochs_of(folder))
    new = Counter(token for i in range(20, 50) for token in plain(data[i])[:-1])
    old = Counter(token for i in range(20) for token in plain(data[i])[:-1])
    assert set(new.values()) == {1} and old.keys() & new.keys()


def test_streams_continue_over_folds_and_epochs(run, folder, tmp_path):
    """Folds that share a dataset read its concatenated epochs, each with a separate order."""
    schedule = schedule_of(folder)
    for name in "abc":
        pieces = [p for fold in schedule.folds for p in fold.slices if p.name == name]
        drawn = [
            plain(run[i]) for i in range(schedule.total_samples) if run.locate(i)[0].name == name
        ]
        orders = [
            megatrons_epoch(pieces[0].path, epoch_seed(5, pieces[0].key, e), tmp_path / str(e))
            for e in range(pieces[-1].last_epoch + 1)
        ]
        stream = [sample for order in orders for sample in order]
        assert drawn == stream[: len(drawn)]
        assert len(drawn) == sum(piece.samples for piece in pieces)
        if len(orders) > 1:
            assert orders[0] != orders[1]
    assert len(run) == schedule.total_samples


def blend_by_largest_deficit(counts: list[int]) -> list[int]:
    """Return the dataset of each sample: the one that is farthest behind its share of the blend."""
    shares, drawn, order = [n / sum(counts) for n in counts], [0] * len(counts), []
    for number in range(sum(counts)):
        left = [i for i, n in enumerate(counts) if drawn[i] < n]
        order.append(max(left, key=lambda i: shares[i] * max(number, 1) - drawn[i]))
        drawn[order[-1]] += 1
    return order


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any))
@example([0, 0, 0, 0, 0, 1])  # megatron-core's helper crashes on empty datasets
def test_every_prefix_of_a_fold_follows_its_blend(counts):
    slices = tuple(DatasetSlice(f"d{i}", "", "", 0, n, 99) for i, n in enumerate(counts))
    which, position = blend_order(FoldPlan("f", 0, sum(counts), slices, ""))
    assert which.tolist() == blend_by_largest_deficit(counts)
    for i, n in enumerate(counts):
        assert position[which == i].tolist() == list(range(n))
        so_far = np.cumsum(which == i)
        expected = np.arange(1, sum(counts) + 1) * n / sum(counts)
        assert np.abs(so_far - expected).max() <= len(counts)


def test_folds_are_drawn_in_the_order_of_their_blends(run, folder):
    """Also from the cached index."""
    for fold in schedule_of(folder).folds:
        order = blend_by_largest_deficit([piece.samples for piece in fold.slices])
        found = [run.locate(position)[0].name for position in range(fold.first_sample, fold.end)]
        assert found == [fold.slices[i].name for i in order]


@given(
    st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 3),
    st.integers(0, 5), st.integers(1, 5),
)  # fmt: skip
def test_a_global_batch_has_the_same_samples_in_every_layout(replicas, size, more, skip, count):
    batch = replicas * size * more
    first, end = skip * batch, (skip + count) * batch
    ranks = [list(MicroBatchSampler(first, end, size, rank, replicas)) for rank in range(replicas)]
    for n in range(count):
        mine = [rank[n * more : (n + 1) * more] for rank in ranks]
        assert all(len(micro) == size for rank in mine for micro in rank)
        found = sorted(sample for rank in mine for micro in rank for sample in micro)
        start = first + n * batch
        assert found == list(range(start, start + batch))
    assert all(len(rank) == count * more for rank in ranks)


def test_a_batch_spanning_two_folds(run, folder):
    schedule = schedule_of(folder)
    edge = schedule.folds[0].end
    assert edge % BATCH  # otherwise the test is void
    batch = range(edge // BATCH * BATCH, edge // BATCH * BATCH + BATCH)
    one = {i: plain(run[i]) for i in batch}
    assert {run.locate(i)[0].key for i in batch if i >= edge} <= {
        piece.key for piece in schedule.folds[1].slices
    }
    for replicas, size in ((2, 1), (2, 2), (4, 2), (1, 8)):
        fresh = FoldDataset(schedule, epochs_of(folder))  # another process
        samplers = [
            MicroBatchSampler(batch[0], batch[-1] + 1, size, r, replicas) for r in range(replicas)
        ]
        found = {i: plain(fresh[i]) for sampler in samplers for micro in sampler for i in micro}
        assert found == one


def test_validation_wraps_around(folder):
    info = next(iter(inspect_datasets(read_fold_file(folder / "folds.yaml")).values()))
    held_out = HeldOutDataset(str(folder / "a"), info.key, 7)
    data = ValidationDataset(held_out, epochs_of(folder))
    size = info.samples_per_epoch(LENGTH)
    assert plain(data[0]) == plain(data[size]) != plain(data[1])


def test_ids_outside_the_vocabulary_are_refused(folder):
    """Ids are from 0 to the vocabulary size minus 1."""
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=99)
    for name, token in (("high", 80), ("negative", -2)):  # in all of document 1
        writer = IndexedDatasetWriter(folder / f"{name}.bin", np.dtype(np.int32))
        writer.add(np.repeat(np.int32([5, token, 7]), 40), np.int32([40, 40, 40]))
        writer.finish(folder / f"{name}.idx")

    def largest(name: str, vocab_size: int | None) -> set[int]:
        fold = {"name": "f", "epochs": 1, "blend": {name: {"path": name}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"folds": [fold]}))
        epochs = EpochDatasets(DataConfig(seq_length=LENGTH), tokenizer, folder / "c", vocab_size)
        schedule = schedule_of(folder, f"{name}.yaml")
        held_out = HeldOutDataset(str(folder / name), schedule.folds[0].slices[0].key, 0)
        sets = (FoldDataset(schedule, epochs), ValidationDataset(held_out, epochs))
        return {max(max(plain(data[i])) for i in range(len(data))) for data in sets}

    assert largest("high", 81) == {80} and largest("negative", None) == {7}
    with pytest.raises(DataError, match=r"/high, document 1: token id 80 .*largest id 79\)"):
        largest("high", 80)
    with pytest.raises(DataError, match=r"/negative, document 1: token id -2 is outside"):
        largest("negative", 99)
