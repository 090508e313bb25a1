"""Indexed datasets, compared with megatron-core's reader and builder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_llmjp.data import indexed_dataset, indexed_dataset_writer
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter, WriterPosition
from megatron_llmjp.errors import UserError


def pack(documents, dtype):
    """Return tokens, lengths and sequences of documents, each a list of sequences."""
    flat = [sequence for document in documents for sequence in document]
    tokens = np.array([token for sequence in flat for token in sequence], dtype)
    lengths = np.array([len(sequence) for sequence in flat], np.int32)
    return tokens, lengths, np.array([len(document) for document in documents], np.int32)


def write(prefix, documents, dtype=np.uint16):
    writer = IndexedDatasetWriter(indexed_dataset.bin_path(prefix), dtype)
    writer.add(*pack(documents, dtype))
    writer.finish(indexed_dataset.idx_path(prefix))
    writer.clean()


DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), max_size=3), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.sampled_from([np.uint16, np.int32]), st.integers(1, 7), st.data())
def test_same_bytes_as_megatron_core_and_round_trip(
    tmp_path_factory, documents, dtype, chunk, data
):
    folder = tmp_path_factory.mktemp("indexed")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(flat, [len(sequence) for sequence in document])
    builder.finalize(str(folder / "theirs.idx"))

    # The writer adds several batches and is killed between two of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_dataset_writer, "CHUNK", chunk)
        cut = data.draw(st.integers(0, len(documents)))
        writer = IndexedDatasetWriter(folder / "ours.bin", dtype)
        writer.add(*pack(documents[:cut], dtype))
        position = writer.sync()
        writer.add(
            *pack(documents[: cut + 2], dtype)
        )  # written but never synced: discarded on resumption
        writer.close()
        writer = IndexedDatasetWriter(folder / "ours.bin", dtype, position)
        writer.add(*pack(documents[cut:], dtype))
        writer.finish(folder / "ours.idx")
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (
            folder / f"theirs.{suffix}"
        ).read_bytes()

    index = indexed_dataset.read_index(folder / "ours")
    sequences = [sequence for document in documents for sequence in document]
    assert (index.documents, index.sequences) == (len(documents), len(sequences))
    assert index.tokens == sum(map(len, sequences))
    if sequences:  # megatron-core cannot map an empty file
        read = indexed_dataset.open_indexed_dataset(folder / "ours")
        assert isinstance(read, IndexedDataset)
        assert [list(read[i]) for i in range(len(read))] == sequences


def test_dtype_is_that_of_megatron_lm():
    for size in (1, 65499, 65500, 65536, 100000):
        assert indexed_dataset.best_dtype(size) == DType.optimal_dtype(size)


def test_reads_datasets_of_megatron_core(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int64, multimodal=True)
    builder.add_item(torch.tensor([1, 2, 3]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "d.idx"))
    index = indexed_dataset.read_index(tmp_path / "d")
    assert (index.tokens, index.dtype, list(index.read_tokens())) == (3, np.int64, [1, 2, 3])


def test_damage_raises(tmp_path):
    prefix = tmp_path / "d"
    write(prefix, [[[1, 2]], [[3]], [[4, 5, 6]]])
    idx, binary = (
        indexed_dataset.idx_path(prefix).read_bytes(),
        indexed_dataset.bin_path(prefix).read_bytes(),
    )

    def damaged(new_idx=idx, new_bin=binary):
        indexed_dataset.idx_path(prefix).write_bytes(new_idx)
        indexed_dataset.bin_path(prefix).write_bytes(new_bin)
        with pytest.raises(UserError) as caught:
            indexed_dataset.read_index(prefix)
        return str(caught.value)

    assert "d.bin: 10 bytes, but its index requires 12" in damaged(new_bin=binary[:-2])
    for cut in (0, 5, 33, 34, len(idx) - 1):
        assert "d.idx" in damaged(idx[:cut])
    assert "not a Megatron index" in damaged(b"X" + idx[1:])
    assert "damaged header" in damaged(idx[:9] + b"\x02" + idx[10:])
    assert "damaged header" in damaged(idx[:17] + b"\x09" + idx[18:])
    assert "document index" in damaged(idx[:-8] + b"\x04" + idx[-7:])
    indexed_dataset.idx_path(prefix).unlink()
    with pytest.raises(UserError, match=r"d\.idx: no such file.*incomplete"):
        indexed_dataset.open_indexed_dataset(prefix)
    with pytest.raises(UserError, match="without its suffix"):
        indexed_dataset.read_index(f"{prefix}.bin")


def test_wrong_dtype_and_missing_files_raise(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "d.bin", np.uint16)
    with pytest.raises(TypeError, match="int32"):
        writer.add(np.array([1], np.int32), np.array([1], np.int32))
    writer.close()
    with pytest.raises(UserError, match="missing, or shorter"):
        IndexedDatasetWriter(tmp_path / "d.bin", np.uint16, WriterPosition(4, 1, 1))
