"""Files of torch_dist checkpoints: their number, names and contents, read by torch."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from megatron_llmjp.convert.files import torch_dist_writer
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter, split_into_chunks
from megatron_llmjp.convert.plan import write_slot
from tests.convert.dtypes import dtype_of


def written(folder: Path, limit: int, tensors: dict[str, torch.Tensor]) -> TorchDistWriter:
    """Write whole tensors; returns the writer."""
    writer = TorchDistWriter(limit, ".")
    slots = []
    for name, tensor in tensors.items():
        for (offsets, sizes), slot in writer.add_tensor(
            name, tuple(tensor.shape), dtype_of(tensor)
        ):
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            slots.append((slot, tensor[box]))
    for output in writer.files:
        output.create(folder)
    for slot, part in slots:
        write_slot(folder, slot, part.contiguous())
    return writer


def test_files_are_filled_to_the_limit(tmp_path):
    """A tensor that fits exactly stays; an empty file takes any tensor; objects take no space."""
    tensors = {name: torch.arange(256.0) for name in "abc"}
    one = TorchDistWriter(1, ".")
    one.add_tensor("a", (256,), DType.float32)
    used = one.files[0].size  # of an archive with a tensor of 1024 bytes
    for limit, counts in (
        (used + 1023, [1, 1, 1]),
        (used + 1024, [2, 1]),
        (10 * used, [3]),
        (1, [1, 1, 1]),
    ):
        folder = tmp_path / str(limit)
        folder.mkdir()
        writer = written(folder, limit, tensors)
        writer.add_object("rest", {"x": 1})
        assert [file.name for file in writer.files[: len(counts)]] == [
            f"./__0_{number}.distcp" for number in range(len(counts))
        ]
        files = [name for name, _, _ in list(writer._storage.values())[:3]]
        assert [files.count(f"__0_{number}.distcp") for number in range(len(counts))] == counts


def test_torch_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_writer, "CHUNK_BYTES", 64)
    tensors = {"a": torch.arange(30.0).view(10, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    writer = written(tmp_path, 10_000, tensors)
    writer.add_alias("again", "a")
    writer.finish(tmp_path, {"iteration": 7})
    assert torch.load(tmp_path / "common.pt") == {"iteration": 7}
    assert (tmp_path / "metadata.json").read_text() == (
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
        '"common_backend": "torch", "common_backend_version": 1}'
    )
    found = {name: torch.zeros_like(tensors[name[0]]) for name in ("a", "b", "again")}
    torch.distributed.checkpoint.load(found, checkpoint_id=str(tmp_path), no_dist=True)
    assert torch.equal(found["a"], tensors["a"]) and torch.equal(found["b"], tensors["b"])
    assert torch.equal(found["again"], tensors["a"])
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    chunks = metadata.state_dict_metadata["a"].chunks
    # 120 bytes in chunks of at most 64: 10 x 64 // 120 rows.
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in chunks] == [
        ((0, 0), (5, 3)), ((5, 0), (5, 3)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((16,), [16]),  # 64 bytes exactly
        ((17,), [16, 1]),
        ((3, 17), [1, 1, 1]),  # a row is larger than a chunk
        ((9, 4), [4, 4, 1]),
    ],
)
def test_chunks(monkeypatch, shape, sizes):
    monkeypatch.setattr(torch_dist_writer, "CHUNK_BYTES", 64)
    chunks = list(split_into_chunks(shape, DType.float32))
    assert [size[0] for _, size in chunks] == sizes
    assert [where for where, _ in chunks] == [
        (sum(sizes[:i]), *[0] * (len(shape) - 1)) for i in range(len(sizes))
    ]
    assert all(size[1:] == shape[1:] for _, size in chunks)
