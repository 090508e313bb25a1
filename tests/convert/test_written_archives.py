"""Archives and safetensors files that are laid out in advance, read by torch and by zipfile."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.safetensors import plan_safetensors, read_header
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.plan import OutputFile, write_slot
from tests.convert.dtypes import dtype_of

TENSORS = {
    "scalar": torch.tensor(7.5),
    "row": torch.arange(5.0),
    "thin": torch.arange(12.0).view(3, 1, 4),
    "thinner": torch.arange(6.0, dtype=torch.float16).view(1, 2, 1, 3, 1),
    "empty": torch.zeros(2, 0, 3),
    "half": torch.arange(8.0).bfloat16().view(2, 4),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "long": torch.tensor([[2**40]]),
}


def write(folder: Path, output: OutputFile) -> Path:
    """Write a planned file with :data:`TENSORS`, and the CRC-32s of zip entries."""
    output.create(folder)
    for key, slot in output.slots.items():
        write_slot(folder, slot, TENSORS[key])
        with (folder / output.name).open("r+b") as stream:
            for offset in slot.checksums:
                stream.seek(offset)
                content = TENSORS[key].reshape(-1).view(torch.uint8).numpy().tobytes()
                stream.write(struct.pack("<I", zlib.crc32(content)))
    return folder / output.name


@pytest.mark.parametrize("base", [0, 100])
def test_an_archive(tmp_path, base):
    held = {key: TensorPlaceholder(key, tuple(t.shape), dtype_of(t)) for key, t in TENSORS.items()}
    tree = {"nested": [OrderedDict(held)], "number": 3}
    output = plan_archive("a.pt", tree, base)
    path = write(tmp_path, output)
    assert path.stat().st_size == output.size
    alone = tmp_path / "alone.pt"  # the archive may be a part of a file
    alone.write_bytes(path.read_bytes()[base:])
    for how in ({}, {"mmap": True}):
        found = torch.load(alone, weights_only=True, **how)
        assert found.keys() == tree.keys() and found["number"] == 3
        (tensors,) = found["nested"]
        assert list(tensors) == list(TENSORS)
        for key, tensor in TENSORS.items():
            assert tensors[key].dtype == tensor.dtype and tensors[key].shape == tensor.shape
            assert torch.equal(tensors[key], tensor) and tensors[key].is_contiguous()
    ours = load_archive(path, base, output.size - base)["nested"][0]
    assert all(torch.equal(ours[key].read(), tensor) for key, tensor in TENSORS.items())
    with zipfile.ZipFile(alone) as archive:
        names = [entry.filename for entry in archive.infolist()]
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        starts = [place_of(alone, entry)[0] for entry in archive.infolist()]
    # The end of the directory, in 64 bits and in 32 (APPNOTE 6.3, 4.3.14 to 4.3.16).
    end = alone.read_bytes()[-98:]
    count = len(names)
    wide = struct.unpack("<4sQ2H2I4Q", end[:56])
    size, at = wide[8], wide[9]
    assert wide == (b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, at)
    assert at + size == output.size - base - 98
    assert struct.unpack("<4sIQI", end[56:76]) == (b"PK\x06\x07", 0, at + size, 1)
    assert struct.unpack("<4s4H2IH", end[76:]) == (
        b"PK\x05\x06", 0, 0, count, count, size, at, 0,
    )  # fmt: skip
    data = [f"archive/data/{number}" for number in range(len(TENSORS))]
    assert names == ["archive/data.pkl", "archive/byteorder", *data, "archive/version"]
    assert [start % 64 for start in starts] == [0] * len(starts)
    storage = [slot.offset - base for slot in output.slots.values()]
    assert storage == starts[2:-1]


def place_of(path: Path, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the start and the size of an entry's data, from its local header (APPNOTE 6.3)."""
    with path.open("rb") as stream:
        stream.seek(entry.header_offset)
        header = struct.unpack("<4s5H3I2H", stream.read(30))
        assert header[0] == b"PK\x03\x04"
        assert stream.read(header[9]) == entry.filename.encode()
        extra = stream.read(header[10])
        sizes = header[7], header[8]
        if 0xFFFFFFFF in sizes:
            kind, length, *sizes = struct.unpack("<HHQQ", extra[:20])
            assert (kind, length) == (1, 16)
            extra = extra[20:]
        kind, length = struct.unpack("<HH", extra[:4])
        assert kind == 0x4246 and extra[4:] == b"Z" * length
        assert sizes[0] == sizes[1]
        return stream.tell(), sizes[0]


@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 2**32])
def test_archives_of_more_than_four_gigabytes(tmp_path, size):
    """From 2^32 - 1 bytes on sizes and offsets are in fields of 64 bits; the file is sparse."""
    sizes = [10, size, 10]
    held = [TensorPlaceholder(str(i), (n,), DType.uint8) for i, n in enumerate(sizes)]
    output = plan_archive("a.pt", held)
    output.create(tmp_path)
    path = tmp_path / "a.pt"
    write_slot(tmp_path, output.slots["2"], torch.arange(10, dtype=torch.uint8))
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()[2:-1]
        assert [entry.file_size for entry in entries] == sizes
        places = [place_of(path, entry) for entry in entries]
    assert places == [(output.slots[str(i)].offset, n) for i, n in enumerate(sizes)]
    found = torch.load(path, weights_only=True, mmap=True)
    assert [len(tensor) for tensor in found] == sizes
    assert found[2].tolist() == list(range(10))
    path.unlink()


def test_a_safetensors_file(tmp_path):
    kinds = {key: (tuple(t.shape), dtype_of(t)) for key, t in TENSORS.items()}
    output = plan_safetensors("a.safetensors", kinds)
    path = write(tmp_path, output)
    assert path.stat().st_size == output.size
    found = safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
    with safetensors.safe_open(path, "pt") as stream:
        assert stream.metadata() == {"format": "pt"}
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0 and min(s.offset for s in output.slots.values()) == 8 + length
    ours = read_header(path)
    assert all(torch.equal(ours[key].read(), tensor) for key, tensor in TENSORS.items())


def test_files_are_closed_and_a_second_creation_changes_nothing(tmp_path):
    """Also not the checksums of tensors: a lost task may still write a complete file."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(3):
        held = {
            key: TensorPlaceholder(key, tuple(t.shape), dtype_of(t)) for key, t in TENSORS.items()
        }
        output = plan_archive(f"{number}", held)
        content = write(tmp_path, output).read_bytes()
        output.create(tmp_path)
        assert (tmp_path / output.name).read_bytes() == content
    assert len(list(Path("/proc/self/fd").iterdir())) == before
