"""Layout of archives for ``torch.load`` whose tensors are written later.

``torch.save`` needs all tensors in memory. Here the pickle is created from placeholders, every
storage gets an offset in the zip archive, and the bytes are written later, in any order.
Source of the layout: torch/serialization.py (``_save``) and the zip specification (APPNOTE 6.3).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import byte_count
from megatron_llmjp.convert.files.torch_pickle import TorchName, TorchPickler
from megatron_llmjp.convert.plan import OutputFile, Slot
from megatron_llmjp.convert.strided_view import Shape, contiguous_strides

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_DATE = (1 << 5) | 1  # 1980-01-01, the earliest date of zip: output is reproducible
_STORAGE_CLASSES = {
    DType.float32: TorchName("torch", "FloatStorage"),
    DType.float16: TorchName("torch", "HalfStorage"),
    DType.bfloat16: TorchName("torch", "BFloat16Storage"),
    DType.uint8: TorchName("torch", "ByteStorage"),
    DType.int64: TorchName("torch", "LongStorage"),
}
_REBUILD = TorchName("torch._utils", "_rebuild_tensor_v2")


@dataclass(frozen=True)
class TensorPlaceholder:
    """Replaces a tensor in an object to be saved; ``key`` is the key of its slot."""

    key: str
    shape: Shape
    dtype: DType


class _Storage:
    """The storage of a placeholder in the pickle."""

    def __init__(self, number: int, placeholder: TensorPlaceholder) -> None:
        self.number, self.placeholder = number, placeholder


class _Pickler(TorchPickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)  # as torch.save; required by weights_only
        self.storages: list[_Storage] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, TensorPlaceholder):
            return super().reducer_override(value)
        storage = _Storage(len(self.storages), value)
        self.storages.append(storage)
        arguments: tuple[Any, ...] = (
            storage,
            0,
            (*value.shape,),  # a new object, as that of torch: it is not shared
            contiguous_strides(value.shape),
            False,
            OrderedDict(),
        )
        return _REBUILD, arguments

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        held = value.placeholder
        count = byte_count(held.shape, held.dtype) // held.dtype.itemsize
        return ("storage", _STORAGE_CLASSES[held.dtype], str(value.number), "cpu", count)


def plan_archive(file: str, value: Any, base: int = 0) -> OutputFile:
    """Lay out an archive.

    Args:
        file: name of the output file.
        value: the object to be saved, with :class:`TensorPlaceholder` in place of tensors.
        base: offset of the archive in the file (a ``.distcp`` file contains many archives).

    Returns:
        The file; its size is the end of the archive, its slots have the placeholders' keys.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    layout = _Zip(base)
    layout.add("data.pkl", stream.getvalue())
    layout.add("byteorder", b"little")
    starts = {}
    for storage in pickler.storages:
        held = storage.placeholder
        name = f"data/{storage.number}"
        starts[held.key] = layout.add_hole(name, byte_count(held.shape, held.dtype))
    layout.add("version", b"3\n")
    crcs = layout.close()
    slots = {}
    for storage in pickler.storages:
        held, name = storage.placeholder, f"data/{storage.number}"
        slots[held.key] = Slot(file, held.key, starts[held.key], held.shape, held.dtype, crcs[name])
    return OutputFile(file, layout.position, layout.fixed, slots)


class _Zip:
    """A zip archive of stored entries at an offset of a file, some with data written later."""

    def __init__(self, base: int) -> None:
        self.base = self.position = base
        self.fixed: list[tuple[int, bytes]] = []
        self._entries: list[tuple[bytes, int, int, int]] = []  # name, crc, size, header's offset

    def add(self, name: str, data: bytes) -> None:
        """Add an entry with known bytes."""
        start = self._header(name, len(data), zlib.crc32(data))
        self.fixed.append((start, data))

    def add_hole(self, name: str, size: int) -> int:
        """Add an entry whose bytes are written later; returns the offset of its bytes."""
        return self._header(name, size, 0)

    def _header(self, name: str, size: int, crc: int) -> int:
        encoded = f"archive/{name}".encode()
        place = self.position
        extra = b"" if size < _LIMIT else struct.pack("<HHQQ", 1, 16, size, size)
        start = place + 30 + len(encoded) + len(extra)
        # Data is aligned to 64 bytes of the archive, for memory maps.
        gap = -(start + 4 - self.base) % _ALIGNMENT
        extra += struct.pack("<HH", 0x4246, gap) + b"Z" * gap  # torch's own padding field, "FB"
        small = min(size, _LIMIT)
        header = struct.pack(
            "<4s5H3I2H",
            b"PK\x03\x04",
            45,
            0x800,
            0,
            0,
            _DATE,
            crc,
            small,
            small,
            len(encoded),
            len(extra),
        )
        self.fixed.append((place, header + encoded + extra))
        self._entries.append((encoded, crc, size, place))
        start = place + len(header) + len(encoded) + len(extra)
        self.position = start + size
        return start

    def close(self) -> dict[str, tuple[int, ...]]:
        """Add the central directory; returns the two offsets of every entry's CRC-32."""
        directory = b""
        crcs: dict[str, tuple[int, ...]] = {}
        begin = self.position
        for name, crc, size, place in self._entries:
            offset = place - self.base
            crcs[name.decode().partition("/")[2]] = (place + 14, begin + len(directory) + 16)
            wide = size >= _LIMIT or offset >= _LIMIT
            extra = struct.pack("<HHQQQ", 1, 24, size, size, offset) if wide else b""
            directory += (
                struct.pack(
                    "<4s6H3I5H2I",
                    b"PK\x01\x02",
                    45,
                    45,
                    0x800,
                    0,
                    0,
                    _DATE,
                    crc,
                    _LIMIT if wide else size,
                    _LIMIT if wide else size,
                    len(name),
                    len(extra),
                    0,
                    0,
                    0,
                    0,
                    _LIMIT if wide else offset,
                )
                + name
                + extra
            )
        at, count = begin - self.base, len(self._entries)
        end = struct.pack(
            "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), at
        )
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, at + len(directory), 1)
        end += struct.pack(
            "<4s4H2IH",
            b"PK\x05\x06",
            0,
            0,
            min(count, 0xFFFF),
            min(count, 0xFFFF),
            min(len(directory), _LIMIT),
            min(at, _LIMIT),
            0,
        )
        self.fixed.append((begin, directory + end))
        self.position = begin + len(directory) + len(end)
        return crcs
