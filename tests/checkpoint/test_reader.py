"""ThreadedReader: tensors written by torch, read in place and through torch's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, ReadItem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType

from megatron_llmjp.checkpoint import reader
from megatron_llmjp.checkpoint.reader import ThreadedReader

LARGE = 4096
"""Size in bytes from which tensors are read in place here."""


class Sync:
    """Counts heartbeats and barriers."""

    def __init__(self) -> None:
        self.beats = self.barriers = 0

    def beat(self) -> None:
        self.beats += 1

    def barrier(self) -> None:
        self.barriers += 1


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(70, 50, generator=generator)
    return {
        "fp32": large,
        "bf16": torch.randn(64, 64, generator=generator).bfloat16(),
        "int64": torch.randint(0, 1 << 40, (3000,), generator=generator),
        "view": torch.randn(100, 100, generator=generator)[20:90],  # with a storage offset
        "transposed": torch.randn(60, 80, generator=generator).t(),
        "small": torch.randn(3, generator=generator),
    }


IN_PLACE = {"fp32", "bf16", "int64"}
"""Tensors that are stored in the form of their targets."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(reader, "READ_IN_PLACE_BYTES", LARGE)
    monkeypatch.setattr(reader, "READ_CALL_BYTES", 1000)
    dcp.save(tensors(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


@pytest.fixture
def by_torch(monkeypatch) -> set[str]:
    """Names of the tensors that torch's reader is asked for."""
    names: set[str] = set()
    read = FileSystemReader.read_data

    def recorded(self, plan, planner):
        names.update(item.storage_index.fqn for item in plan.items)
        return read(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", recorded)
    return names


def load(folder: Path, targets: dict[str, torch.Tensor], sync: Sync) -> None:
    dcp.load(targets, storage_reader=ThreadedReader(str(folder), sync), no_dist=True)


def test_every_tensor_is_equal(folder, by_torch):
    sync = Sync()
    written = tensors()
    found = {name: torch.zeros_like(value).contiguous() for name, value in written.items()}
    places = {name: value.data_ptr() for name, value in found.items()}
    load(folder, found, sync)
    for name, value in written.items():
        assert torch.equal(found[name], value), name
    assert {name: value.data_ptr() for name, value in found.items()} == places
    assert written.keys() - by_torch >= IN_PLACE and "small" in by_torch
    assert sync.beats >= 70 * 50 * 4 // 1000 and sync.barriers == 1


def test_other_forms_are_converted_by_torch(folder, by_torch):
    written = tensors()
    found = {
        "fp32": torch.zeros(70, 50, dtype=torch.bfloat16),
        "bf16": torch.zeros(64, 64).t(),
        "int64": torch.zeros(3000, dtype=torch.int64),
    }
    load(folder, found, Sync())
    assert torch.equal(found["fp32"], written["fp32"].bfloat16())
    assert torch.equal(found["bf16"], written["bf16"].float())
    assert by_torch == {"fp32", "bf16"}


@pytest.mark.parametrize(("first", "in_place"), [(0, False), (20, False), (0, True), (20, True)])
def test_parts_of_tensors(folder, by_torch, first, in_place):
    """As from another parallel layout: rows of a larger tensor, or a tensor into rows."""
    whole = tensors()["fp32"]
    target = torch.zeros(100, 50) if in_place else torch.zeros(50, 50)
    index = MetadataIndex("fp32", torch.Size([0, 0]), 0)
    start = torch.Size([first, 0])
    nowhere = torch.Size([0, 0])
    item = ReadItem(
        LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=start if in_place else nowhere,
        storage_index=index,
        storage_offsets=nowhere if in_place else start,
        lengths=whole.shape if in_place else target.shape,
    )
    source = ThreadedReader(str(folder), Sync())
    metadata = source.read_metadata()
    source.set_up_storage_reader(metadata, is_coordinator=True)
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"fp32": target}, metadata, is_coordinator=True)
    source.read_data(LoadPlan([item]), planner).wait()
    if in_place:
        assert torch.equal(target[first : first + 70], whole)
        assert target.count_nonzero() == whole.count_nonzero()
    else:
        assert torch.equal(target, whole[first : first + 50])
    assert by_torch == (set() if in_place else {"fp32"})


def test_a_truncated_tensor_raises(folder):
    index = FileSystemReader(folder).read_metadata()
    place = index.storage_data[MetadataIndex("int64", torch.Size([0]), 0)]
    path = folder / place.relative_path
    archive = path.read_bytes()
    at = archive.index(tensors()["int64"][:4].numpy().tobytes())
    path.write_bytes(archive[: at + 5000])
    found = {"int64": torch.zeros(3000, dtype=torch.int64)}
    sync = Sync()
    with pytest.raises(CheckpointException) as caught:
        load(folder, found, sync)
    assert "PytorchStreamReader failed" in str(caught.value)
    assert sync.barriers == 1  # other ranks do not wait forever
