"""The CRC-32 of a file from those of its pieces, without reading what was written.

PyTorch distributed checkpoints (torch_dist) without a process group.

A folder holds ``.metadata``, a pickle that says which rectangular chunk of which tensor lies at
which bytes of which ``.distcp`` file, and each chunk is an archive of ``torch.save`` of its own.
Source: torch/distributed/checkpoint/{metadata,filesystem}.py; megatron-core adds ``common.pt``
and ``metadata.json`` (megatron/core/dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.convert.files.checksums import ChecksumRange, combine_crc32
from megatron_llmjp.convert.files.storage import FileTensor, byte_count
from megatron_llmjp.convert.files.torch_archive import load_archive, resolve_global
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.plan import OutputFile, Slot, TensorRead
from megatron_llmjp.convert.tensors import Shape, rectangular_parts, whole
from megatron_llmjp.errors import UserError


def planned_file_crc32(file: OutputFile, sums: Mapping[tuple[str, int], int]) -> int:
    """The CRC-32 of a file that was filled.

    Args:
        file: its plan.
        sums: CRC-32 of the tensors in it, by file and offset.

    Raises:
        ValueError: the pieces do not cover the file, which is a bug of a format.
    """
    patches = {
        place: sums[slot.file, slot.offset].to_bytes(4, "little")
        for slot in file.slots.values()
        for place in slot.checksums
    }
    pieces = [(at, len(data), zlib.crc32(_patched(at, data, patches))) for at, data in file.fixed]
    pieces += [(s.offset, s.nbytes, sums[s.file, s.offset]) for s in file.slots.values()]
    total = position = 0
    for start, length, crc in sorted(pieces):
        if start != position:
            raise ValueError(f"{file.name}: nothing is planned at {position}")
        total = combine_crc32(total, crc, length)
        position += length
    if position != file.size:
        raise ValueError(f"{file.name}: {position} of {file.size} bytes are planned")
    return total


def _patched(start: int, data: bytes, patches: Mapping[int, bytes]) -> bytes:
    """Fixed bytes with the checksums that were written into them."""
    found = {
        place - start: four for place, four in patches.items() if 0 <= place - start < len(data)
    }
    if not found:
        return data
    changed = bytearray(data)
    for place, four in found.items():
        changed[place : place + 4] = four
    return bytes(changed)


METADATA = ".metadata"
_COMMON_STATE = "common_state/shard_0_1"
CHUNK_BYTES = 256 << 20
"""Chunks are written no larger than this: whoever loads one holds it twice."""


@dataclass(frozen=True)
class ChunkTensor:
    """A chunk, of one layer if layers are stacked: an archive inside a ``.distcp`` file."""

    path: Path
    offset: int
    length: int
    shape: Shape
    dtype: torch.dtype
    checksum_range: ChecksumRange | None = None
    """The file, where a manifest has its checksum; else the archive may have one inside."""

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The checksums that reading it takes part in."""
        return () if self.checksum_range is None else (self.checksum_range,)

    @property
    def source(self) -> str:
        """The file."""
        return str(self.path)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the chunk, into fresh memory or a contiguous tensor of as many elements.

        Raises:
            UserError: the file is damaged.
        """
        found = load_archive(self.path, self.offset, self.length, self.checksum_range)
        count = byte_count(self.shape, torch.uint8)
        if not isinstance(found, FileTensor) or byte_count(found.shape, torch.uint8) != count:
            raise UserError(f"{self.path}: damaged: no tensor {self.shape} at {self.offset}")
        tensor = found.read(into).view(self.shape)
        if self.checksum_range is None and found.checksum_range is not None:
            found.checksum_range.finish()  # nobody else reads this archive
        return tensor


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a distributed checkpoint: its shape, and the place of each chunk."""

    shape: Shape
    dtype: torch.dtype
    chunks: dict[tuple[Shape, Shape], tuple[Path, int, int]]
    files: Mapping[Path, ChecksumRange] = field(default_factory=dict)
    """Files with a checksum of their own."""

    def tensor_read(self, index: int | None) -> TensorRead:
        """How to read the tensor, or one layer of a tensor stacked as ``[layers, ...]``.

        Raises:
            UserError: the chunks do not cover it.
        """
        wanted, shape = self.chunks, self.shape
        if index is not None:
            wanted = {
                (offsets[1:], sizes[1:]): place
                for (offsets, sizes), place in self.chunks.items()
                if offsets[0] == index and sizes[0] == 1
            }
            shape = self.shape[1:]
        covered = sum(byte_count(sizes, torch.uint8) for _, sizes in wanted)
        if covered != byte_count(shape, torch.uint8):
            where = next(iter(self.chunks.values()))[0].parent
            raise UserError(f"{where}: the chunks of a tensor {shape} do not cover it")
        parts = [
            ChunkTensor(path, offset, length, sizes, self.dtype, self.files.get(path))
            for (_, sizes), (path, offset, length) in wanted.items()
        ]
        layout = whole if len(parts) == 1 else partial(rectangular_parts, places=tuple(wanted))
        return TensorRead(shape, self.dtype, parts, layout)


def read_metadata(
    folder: Path, files: Mapping[Path, ChecksumRange] | None = None
) -> dict[str, TensorEntry]:
    """The tensors of a distributed checkpoint by key; objects are left out.

    Args:
        folder: of one iteration.
        files: checksums of its files, where a manifest has them.

    Raises:
        UserError: ``.metadata`` is missing, damaged or of a kind that cannot be read.
    """
    metadata = _open_metadata(folder)
    try:
        places = _places(folder, metadata.storage_data)
        return {
            key: _entry(key, value, places, files or {})
            for key, value in metadata.state_dict_metadata.items()
            if hasattr(value, "chunks")
        }
    except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{folder / METADATA}: damaged ({error!r})") from error


def _open_metadata(folder: Path) -> Any:
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            return _MetadataUnpickler(stream, path).load()
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so this is no distributed checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: damaged ({error!r})") from error


def read_common_state(folder: Path) -> dict[str, Any]:
    """What a distributed checkpoint stores next to its tensors: arguments, iteration, schedule.

    Raises:
        UserError: it is missing or damaged.
    """
    if (folder / "common.pt").exists() or not (folder / METADATA).exists():
        common = load_archive(folder / "common.pt")
    else:  # megatron-core from 0.19 on
        common = read_object(folder, _COMMON_STATE)
        if common is None:
            raise UserError(f"{folder}: holds neither common.pt nor {_COMMON_STATE}")
        common = common[0] if isinstance(common, list) and len(common) == 1 else common
    if not isinstance(common, dict):
        raise UserError(f"{folder}: damaged: its common state is no dictionary")
    return common


def read_object(folder: Path, key: str) -> Any:
    """A small object among the tensors of a distributed checkpoint; None where it is not there.

    Raises:
        UserError: it is damaged.
    """
    place = _places(folder, _open_metadata(folder).storage_data).get((key, None))
    return None if place is None else load_archive(*place)


class _MetadataUnpickler(pickle._Unpickler):  # the one in C trusts sizes in the file
    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        return resolve_global(module, name, self._path)


def _places(folder: Path, storage_data: Any) -> dict[tuple[str, Any], tuple[Path, int, int]]:
    places = {}
    for index, info in storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{folder}: compressed chunks cannot be read")
        if "/" in info.relative_path:
            raise UserError(f"{folder}: names a file outside its folder: {info.relative_path}")
        offset = getattr(index, "offset", None)
        where = None if offset is None else tuple(offset)
        place = (folder / info.relative_path, int(info.offset), int(info.length))
        places[index.fqn, where] = place
    return places


def _entry(
    key: str, value: Any, places: dict[Any, Any], files: Mapping[Path, ChecksumRange]
) -> TensorEntry:
    dtype = value.properties.state[0]
    chunks = {}
    for chunk in value.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        chunks[offsets, sizes] = places[key, offsets]
    return TensorEntry(tuple(value.size), dtype, chunks, files)


class TorchDistWriter:
    """Lays out a distributed checkpoint: chunks of tensors and small objects in files of a size.

    Call :meth:`add_tensor` and :meth:`add_object`, then take :attr:`files`; call :meth:`finish`
    when the files are filled.
    """

    def __init__(self, max_file_size: int, folder: str) -> None:
        self._limit, self._folder = max_file_size, folder
        self.files: list[OutputFile] = []
        self._storage: dict[tuple[str, Shape | None, int | None], tuple[str, int, int]] = {}
        self._tensors: dict[str, tuple[Shape, torch.dtype, list[tuple[Shape, Shape]]]] = {}
        self._objects: list[str] = []

    def add_tensor(
        self, key: str, shape: Shape, dtype: torch.dtype, layer: tuple[int, int] | None = None
    ) -> list[tuple[tuple[Shape, Shape], Slot]]:
        """Make room for a tensor, or for one layer of a tensor stacked as ``[layers, ...]``.

        Args:
            key: the tensor's name on disk.
            shape: of the tensor, or of the one layer.
            dtype: its type.
            layer: (index, number of layers) for a stacked tensor.

        Returns:
            The boxes into which the tensor is cut, and the slot of each.
        """
        lead = () if layer is None else (layer[0],)
        stacked = shape if layer is None else (layer[1], *shape)
        _, _, chunks = self._tensors.setdefault(key, (stacked, dtype, []))
        found = []
        for offsets, sizes in split_into_chunks(shape, dtype):
            where = (*lead, *offsets)
            size = sizes if layer is None else (1, *sizes)
            name = f"{key}{list(where)}"
            file = self._room(byte_count(sizes, dtype))
            start = file.size
            archive = plan_archive(file.name, TensorPlaceholder(name, size, dtype), start)
            self._append(file, archive)
            self._storage[key, where, len(chunks)] = (
                Path(file.name).name,
                start,
                file.size - start,
            )
            chunks.append((where, size))
            found.append(((offsets, sizes), archive.slots[name]))
        return found

    def add_alias(self, key: str, of: str) -> None:
        """Let another name mean the same bytes as the tensor ``of``, which is complete."""
        self._tensors[key] = self._tensors[of]
        for index, (where, _) in enumerate(self._tensors[of][2]):
            self._storage[key, where, index] = self._storage[of, where, index]

    def add_object(self, key: str, value: Any) -> None:
        """Add a small object without tensors."""
        file = self._room(0)
        start = file.size
        self._append(file, plan_archive(file.name, value, start))
        self._storage[key, None, None] = (Path(file.name).name, start, file.size - start)
        self._objects.append(key)

    def _room(self, size: int) -> OutputFile:
        if not self.files or (self.files[-1].size and self.files[-1].size + size > self._limit):
            self.files.append(OutputFile(f"{self._folder}/__0_{len(self.files)}.distcp", 0, [], {}))
        return self.files[-1]

    def _append(self, file: OutputFile, archive: OutputFile) -> None:
        file.size = archive.size
        file.fixed += archive.fixed
        file.slots |= archive.slots

    def checksums(self, sums: Mapping[tuple[str, int], int]) -> dict[str, int]:
        """CRC-32 of every file, by its name in the folder, from those of the tensors in it."""
        return {Path(file.name).name: planned_file_crc32(file, sums) for file in self.files}

    def finish(self, folder: Path, common: dict[str, Any]) -> None:
        """Write what goes beside the chunks: ``.metadata``, ``common.pt`` and ``metadata.json``."""
        (folder / METADATA).write_bytes(self._metadata())
        buffer = io.BytesIO()  # torch.save into a file does not say why it failed
        torch.save(common, buffer)
        (folder / "common.pt").write_bytes(buffer.getvalue())
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")

    def _metadata(self) -> bytes:
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        entries: dict[str, Any] = {
            key: dcp.TensorStorageMetadata(
                dcp.TensorProperties(dtype=dtype),
                torch.Size(shape),
                [dcp.ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks],
            )
            for key, (shape, dtype, chunks) in self._tensors.items()
        }
        entries |= {key: dcp.BytesStorageMetadata() for key in self._objects}
        storage = {
            dcp.MetadataIndex(key, offsets, index): _StorageInfo(*place)
            for (key, offsets, index), place in self._storage.items()
        }
        return pickle.dumps(dcp.Metadata(entries, storage_data=storage))


def split_into_chunks(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Shape, Shape]]:
    """Cut a tensor along its first dimension into boxes of at most ``CHUNK_BYTES``."""
    total = byte_count(shape, dtype)
    count = shape[0]
    step = max(1, count if total <= CHUNK_BYTES else count * CHUNK_BYTES // total)
    rest = shape[1:]
    for start in range(0, count, step):
        yield (start, *(0 for _ in rest)), (min(step, count - start), *rest)
