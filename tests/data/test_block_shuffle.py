"""The block-wise shuffle, compared with its definition written out, on data with unique tokens."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data import block_tokens
from megatron_llmjp.data.block_tokens import count_block_tokens
from megatron_llmjp.data.folds.datasets import compute_keys
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter, write_idx
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.sample_spans import samples_containing, sequence_spans
from megatron_llmjp.errors import DataError
from megatron_llmjp.tokenizers import load_tokenizer

LENGTH = 16
DOCUMENTS = 3 * 4096 + 100


def mix(value: int) -> int:
    """SplitMix64's finalizer."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def keys_of(seed: int, purpose: str) -> tuple[int, ...]:
    return struct.unpack("<8Q", hashlib.sha512(f"{seed}/{purpose}".encode()).digest())


def by_hash(numbers: range, key: int) -> list[int]:
    """Sort by the bits of the hash that are above those of the place."""
    bits = (len(numbers) - 1).bit_length()
    return sorted(numbers, key=lambda number: mix(number ^ key) >> bits)


def row_of(sample: int, rows: int, seed: int) -> int:
    """Eight rounds between the high and the low half of the bits, until a row is found."""
    bits = max(2, (rows - 1).bit_length())
    low_bits = bits // 2
    while True:
        high, low = divmod(sample, 2**low_bits)
        for turn, key in enumerate(keys_of(seed, "samples")):
            if turn % 2 == 0:
                high ^= mix(low ^ key) % 2 ** (bits - low_bits)
            else:
                low ^= mix(high ^ key) % 2**low_bits
        sample = high * 2**low_bits + low
        if sample < rows:
            return sample


def expected_samples(lengths: np.ndarray, seed: int) -> list[list[int]]:
    """Return all samples of an epoch of tokens 0, 1, 2, ..., by the definition."""
    ends = np.cumsum(lengths)
    documents = [range(e - n, e) for e, n in zip(ends.tolist(), lengths.tolist(), strict=True)]
    blocks = [range(n, min(n + 4096, len(lengths))) for n in range(0, len(lengths), 4096)]
    block_key, document_key, *_ = keys_of(seed, "documents")
    stream: list[int] = []
    for block in by_hash(range(len(blocks)), block_key):
        for document in by_hash(blocks[block], document_key):
            stream += documents[document]
    rows = (len(stream) - 1) // LENGTH
    firsts = [row_of(sample, rows, seed) * LENGTH for sample in range(rows)]
    return [stream[first : first + LENGTH + 1] for first in firsts]


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    """Lengths of four blocks of documents; some are empty, and one is longer than a sample."""
    found = np.random.default_rng(0).integers(0, 5, DOCUMENTS).astype(np.int32)
    found[4096:4200] = 0
    found[7] = 100
    return found


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, lengths) -> Path:
    return write(tmp_path_factory.mktemp("blocks") / "d", lengths)


def write(prefix: Path, lengths: np.ndarray, sequences: np.ndarray | None = None) -> Path:
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.dtype(np.int32))
    writer.add(np.arange(lengths.sum(), dtype=np.int32), lengths, sequences)
    writer.finish(prefix.with_suffix(".idx"))
    writer.clean()
    return prefix


def epoch_of(prefix: Path, seed: int):
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=99)
    epochs = EpochDatasets(DataConfig(seq_length=LENGTH), tokenizer, prefix.parent / "cache")
    return epochs.open(compute_keys(str(prefix)).key, str(prefix), seed, "blocks")


def plain(sample) -> list[int]:
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


@pytest.mark.parametrize("seed", [1, 2**32 - 1])
def test_samples_equal_the_definition(prefix, lengths, seed):
    data = epoch_of(prefix, seed)
    expected = expected_samples(lengths, seed)
    assert len(data) == len(expected) == (lengths.sum() - 1) // LENGTH
    assert [plain(data[n]) for n in range(0, len(data), 7)] == expected[::7]
    tokens = Counter(token for sample in expected for token in sample[:-1])
    assert set(tokens.values()) == {1}  # the definition uses every token once
    with pytest.raises(IndexError):
        data[len(data)]
    assert not (prefix.parent / "cache").exists()  # nothing is stored


def test_epochs_have_different_orders(prefix):
    one, other = (epoch_of(prefix, seed) for seed in (1, 2))
    samples = [{tuple(plain(data[n])) for n in range(200)} for data in (one, other)]
    assert not samples[0] & samples[1]


@pytest.mark.parametrize("documents", [1, 2, 4096, 4097])
def test_small_and_full_blocks(tmp_path, documents):
    lengths = np.full(documents, LENGTH + 1, np.int32)
    data = epoch_of(write(tmp_path / "d", lengths), 3)
    expected = expected_samples(lengths, 3)
    assert [plain(data[n]) for n in range(0, len(data), 50)] == expected[::50]


def test_a_dataset_may_have_gaps_and_any_order(tmp_path, lengths, prefix):
    """As the folds that split_folds writes."""
    index, some = read_index(prefix), np.random.default_rng(1).permutation(DOCUMENTS)[:5000]
    (tmp_path / "d.bin").write_bytes(prefix.with_suffix(".bin").read_bytes())
    pointers = index.pointers[some]
    write_idx(tmp_path / "d.idx", index.dtype, lengths[some], np.ones(5000, np.int32), pointers)
    data = epoch_of(tmp_path / "d", 1)
    starts = pointers // 4
    pairs = zip(starts, lengths[some], strict=True)
    renumbered = np.concatenate([np.arange(start, start + n) for start, n in pairs])
    expected = [renumbered[sample].tolist() for sample in expected_samples(lengths[some], 1)]
    assert [plain(data[n]) for n in range(0, len(data), 7)] == expected[::7]


def test_lineage_equals_the_samples(tmp_path):
    """On documents of one to three sequences."""
    draw = np.random.default_rng(5)
    sequences = draw.integers(1, 4, 2500).astype(np.int32)
    lengths = draw.integers(0, 9, int(sequences.sum())).astype(np.int32)
    data = epoch_of(write(tmp_path / "d", lengths, sequences), 9)
    starts = np.cumsum(lengths) - lengths
    samples = [plain(data[n]) for n in range(len(data))]
    for number in range(0, len(data), 13):
        found = [
            int(starts[sequence]) + first + n
            for sequence, first, count in sequence_spans(data, number)
            for n in range(count)
        ]
        assert found == samples[number]
    ends = np.cumsum(lengths)[np.cumsum(sequences) - 1]
    for document in [*range(0, 2500, 100), 2499]:
        tokens = set(range(int(ends[document - 1]) if document else 0, int(ends[document])))
        expected = [n for n, sample in enumerate(samples) if tokens & set(sample)]
        assert samples_containing(data, document).tolist() == expected


def test_a_dataset_that_changes_during_a_run_is_refused(tmp_path):
    lengths = np.full(50, 30, np.int32)
    data = epoch_of(write(tmp_path / "d", lengths), 3)
    plain(data[0])
    lengths[:] = 29
    write(tmp_path / "d", lengths)
    with pytest.raises(DataError, match=r"have 1,450 tokens instead of 1,500: the dataset was"):
        epoch_after_the_change(data)


def epoch_after_the_change(data):
    data.dataset.files.close()  # as if other datasets had been read meanwhile
    return data[0]


def test_tokens_are_counted_by_block(prefix, lengths, monkeypatch):
    blocks = [lengths[n : n + 4096].sum() for n in range(0, DOCUMENTS, 4096)]
    assert count_block_tokens(read_index(prefix)).tolist() == blocks
    monkeypatch.setattr(block_tokens, "_CHUNK", 2 * 4096)
    assert count_block_tokens(read_index(prefix)).tolist() == blocks


def test_a_negative_length_is_named(tmp_path):
    lengths = np.full(50, 30, np.int32)
    write(tmp_path / "d", lengths)
    with (tmp_path / "d.idx").open("r+b") as stream:
        stream.seek(34 + 4 * 20)
        stream.write((-5).to_bytes(4, "little", signed=True))
    with pytest.raises(DataError, match="sequence 20: length -5 is negative"):
        count_block_tokens(read_index(tmp_path / "d"))
