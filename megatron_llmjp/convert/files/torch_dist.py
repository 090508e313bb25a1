"""Reader and writer of PyTorch distributed checkpoints (torch_dist) without a process group.

A folder contains ``.metadata``, a pickle with the file, the offset and the length of every
rectangular chunk of every tensor, and ``.distcp`` files; each chunk is a ``torch.save`` archive.
Source: torch/distributed/checkpoint/{metadata,filesystem}.py; megatron-core adds ``common.pt``
and ``metadata.json`` (megatron/core/dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.checkpoint.bounded_unpickler import BoundedUnpickler
from megatron_llmjp.convert.files.checksums import ChecksumRange, combine_crc32
from megatron_llmjp.convert.files.storage import Extents, FileTensor, byte_count
from megatron_llmjp.convert.files.torch_archive import load_archive, resolve_global
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.plan import OutputFile, Slot, TensorRead
from megatron_llmjp.convert.tensors import Shape, rectangular_parts, whole
from megatron_llmjp.errors import UserError

METADATA = ".metadata"
_COMMON_STATE = "common_state/shard_0_1"
CHUNK_BYTES = 256 << 20
"""Largest chunk that is written; loading a chunk needs twice its size in memory."""


def planned_file_crc32(file: OutputFile, sums: Mapping[tuple[str, int], int]) -> int:
    """Return the CRC-32 of a written file without reading it.

    Args:
        file: layout of the file.
        sums: CRC-32 of the tensors in it, by file and offset.

    Raises:
        ValueError: fixed bytes and tensors do not cover the file, a bug in a format.
    """
    patches = {
        place: sums[slot.file, slot.offset].to_bytes(4, "little")
        for slot in file.slots.values()
        for place in slot.checksums
    }
    pieces = [
        (at, len(data), zlib.crc32(_apply_patches(at, data, patches))) for at, data in file.fixed
    ]
    pieces += [(s.offset, s.nbytes, sums[s.file, s.offset]) for s in file.slots.values()]
    total = position = 0
    for start, length, crc in sorted(pieces):
        if start != position:
            raise ValueError(f"{file.name}: no data is planned at byte {position}")
        total = combine_crc32(total, crc, length)
        position += length
    if position != file.size:
        raise ValueError(f"{file.name}: {position} of {file.size} bytes are planned")
    return total


def _apply_patches(start: int, data: bytes, patches: Mapping[int, bytes]) -> bytes:
    """Return fixed bytes with the CRC-32s that were written into them."""
    found = {
        place - start: four for place, four in patches.items() if 0 <= place - start < len(data)
    }
    if not found:
        return data
    changed = bytearray(data)
    for place, four in found.items():
        changed[place : place + 4] = four
    return bytes(changed)


@dataclass(frozen=True)
class ChunkTensor:
    """A chunk of a tensor, or of one layer of stacked layers: an archive in a ``.distcp`` file."""

    path: Path
    offset: int
    length: int
    shape: Shape
    dtype: torch.dtype
    checksum_range: ChecksumRange | None = None
    """The file, if a manifest has its CRC-32; otherwise the archive may contain CRC-32s."""

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The ranges whose CRC-32 includes the chunk's bytes."""
        return () if self.checksum_range is None else (self.checksum_range,)

    @property
    def source(self) -> str:
        """Path of the file."""
        return str(self.path)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the chunk into new memory, or into a contiguous tensor of as many elements.

        Raises:
            UserError: the file is damaged.
        """
        found = self._load()
        tensor = found.read(into).view(self.shape)
        if self.checksum_range is None and found.checksum_range is not None:
            found.checksum_range.finish()  # this archive is read only once
        return tensor

    def extents(self) -> Extents | None:
        """Return the location of the tensor in the archive, unless its elements are reordered.

        Raises:
            UserError: the file is damaged.
        """
        found = self._load()
        return found.extents() if found.dtype == self.dtype else None

    def _load(self) -> FileTensor:
        found = load_archive(self.path, self.offset, self.length, self.checksum_range)
        count = math.prod(self.shape)
        if not isinstance(found, FileTensor) or math.prod(found.shape) != count:
            raise UserError(f"{self.path}: damaged: no tensor {self.shape} at byte {self.offset}")
        return found


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a distributed checkpoint: its shape, and the location of each chunk.

    ``chunks`` maps (offsets, sizes) in the tensor to (file, offset in bytes, length in bytes).
    """

    shape: Shape
    dtype: torch.dtype
    chunks: dict[tuple[Shape, Shape], tuple[Path, int, int]]
    files: Mapping[Path, ChecksumRange] = field(default_factory=dict)
    """Files with a known CRC-32."""

    def tensor_read(self, index: int | None) -> TensorRead:
        """Return how to read the tensor, or one layer of a tensor stacked as ``[layers, ...]``.

        Raises:
            UserError: the chunks do not cover the tensor.
        """
        wanted, shape = self.chunks, self.shape
        if index is not None:
            wanted = {
                (offsets[1:], sizes[1:]): place
                for (offsets, sizes), place in self.chunks.items()
                if offsets[0] == index and sizes[0] == 1
            }
            shape = self.shape[1:]
        covered = sum(math.prod(sizes) for _, sizes in wanted)
        if covered != math.prod(shape):
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
    """Read the tensors of a distributed checkpoint by key, without other objects.

    Args:
        folder: checkpoint of one iteration.
        files: files with a CRC-32 in a manifest.

    Raises:
        UserError: ``.metadata`` is missing, damaged or not supported.
    """
    metadata = _open_metadata(folder)
    try:
        places = _chunk_locations(folder, metadata.storage_data)
        return {
            key: _tensor_entry(key, value, places, files or {})
            for key, value in metadata.state_dict_metadata.items()
            if hasattr(value, "chunks")
        }
    except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{folder / METADATA}: damaged ({error!r})") from error


def _open_metadata(folder: Path) -> Any:
    path = folder / METADATA
    try:
        return _MetadataUnpickler(path.read_bytes(), path).load()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; the folder is not a distributed checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: damaged ({repr(error)[:300]})") from error


def read_common_state(folder: Path) -> dict[str, Any]:
    """Read the common state of a distributed checkpoint: arguments, iteration, scheduler.

    Raises:
        UserError: the state is missing or damaged.
    """
    if (folder / "common.pt").exists() or not (folder / METADATA).exists():
        common = load_archive(folder / "common.pt")
    else:  # megatron-core from 0.19 on
        common = read_object(folder, _COMMON_STATE)
        if common is None:
            raise UserError(f"{folder}: contains neither common.pt nor {_COMMON_STATE}")
        common = common[0] if isinstance(common, list) and len(common) == 1 else common
    if not isinstance(common, dict):
        raise UserError(f"{folder}: damaged: its common state is not a dictionary")
    return common


def read_object(folder: Path, key: str) -> Any:
    """Read an object of a distributed checkpoint that is not a tensor; None if it does not exist.

    Raises:
        UserError: the object is damaged.
    """
    place = _chunk_locations(folder, _open_metadata(folder).storage_data).get((key, None))
    return None if place is None else load_archive(*place)


def read_objects(folder: Path, name: str) -> dict[str, Any]:
    """Read the shards of an object that ranks store under a name, by their keys."""
    places = _chunk_locations(folder, _open_metadata(folder).storage_data)
    found = {key: place for (key, _), place in places.items() if key.startswith(f"{name}/shard_")}
    return {key: load_archive(*place) for key, place in found.items()}


class _MetadataUnpickler(BoundedUnpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        return resolve_global(module, name, self._path)


def _chunk_locations(
    folder: Path, storage_data: Any
) -> dict[tuple[str, Any], tuple[Path, int, int]]:
    places = {}
    for index, info in storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{folder}: compressed chunks are not supported")
        if "/" in info.relative_path:
            raise UserError(f"{folder}: .metadata names a file outside it: {info.relative_path}")
        offset = getattr(index, "offset", None)
        where = None if offset is None else tuple(offset)
        place = (folder / info.relative_path, int(info.offset), int(info.length))
        places[index.fqn, where] = place
    return places


def _tensor_entry(
    key: str, value: Any, places: dict[Any, Any], files: Mapping[Path, ChecksumRange]
) -> TensorEntry:
    dtype = value.properties.state[0]
    chunks = {}
    for chunk in value.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        chunks[offsets, sizes] = places[key, offsets]
    return TensorEntry(tuple(value.size), dtype, chunks, files)


class TorchDistWriter:
    """Layout of a distributed checkpoint: tensor chunks and objects in files of limited size.

    Call :meth:`add_tensor` and :meth:`add_object`, then write the tensors of :attr:`files`, then
    call :meth:`finish`.
    """

    def __init__(self, max_file_size: int, folder: str) -> None:
        self._limit, self._folder = max_file_size, folder
        self.files: list[OutputFile] = []
        self._storage: dict[tuple[str, Shape | None, int | None], tuple[str, int, int]] = {}
        self._tensors: dict[str, tuple[Shape, torch.dtype, list[tuple[Shape, Shape]]]] = {}
        self._objects: list[str] = []
        self.mcore_data: dict[str, dict[str, Any]] = {}
        """megatron-core's own metadata of tensors, by key."""

    def add_tensor(
        self, key: str, shape: Shape, dtype: torch.dtype, layer: tuple[int, int] | None = None
    ) -> list[tuple[tuple[Shape, Shape], Slot]]:
        """Add a tensor, or one layer of a tensor stacked as ``[layers, ...]``.

        Args:
            key: name of the tensor in the checkpoint.
            shape: shape of the tensor, or of the layer.
            dtype: type of the elements.
            layer: (index, number of layers) for a stacked tensor.

        Returns:
            Offsets and sizes of the chunks, and the slot of each chunk.
        """
        lead = () if layer is None else (layer[0],)
        stacked = shape if layer is None else (layer[1], *shape)
        found = []
        for offsets, sizes in split_into_chunks(shape, dtype):
            size = sizes if layer is None else (1, *sizes)
            slot = self.add_chunk(key, stacked, dtype, (*lead, *offsets), size)
            found.append(((offsets, sizes), slot))
        return found

    def add_chunk(
        self, key: str, shape: Shape, dtype: torch.dtype, offsets: Shape, sizes: Shape
    ) -> Slot:
        """Add one chunk of the tensor ``key`` of this shape; returns the chunk's slot."""
        _, _, chunks = self._tensors.setdefault(key, (shape, dtype, []))
        name = f"{key}{list(offsets)}"
        file = self._file_with_space(byte_count(sizes, dtype))
        start = file.size
        archive = plan_archive(file.name, TensorPlaceholder(name, sizes, dtype), start)
        self._append_archive(file, archive)
        self._storage[key, offsets, len(chunks)] = (Path(file.name).name, start, file.size - start)
        chunks.append((offsets, sizes))
        return archive.slots[name]

    def add_alias(self, key: str, of: str) -> None:
        """Add a second key for the bytes of the tensor ``of``, all chunks of which were added."""
        self._tensors[key] = self._tensors[of]
        for index, (where, _) in enumerate(self._tensors[of][2]):
            self._storage[key, where, index] = self._storage[of, where, index]

    def add_object(self, key: str, value: Any) -> None:
        """Add a small object."""
        data = _saved(value)
        file = self._file_with_space(len(data))
        self._storage[key, None, None] = (Path(file.name).name, file.size, len(data))
        file.fixed.append((file.size, data))
        file.size += len(data)
        self._objects.append(key)

    def _file_with_space(self, size: int) -> OutputFile:
        if not self.files or (self.files[-1].size and self.files[-1].size + size > self._limit):
            self.files.append(OutputFile(f"{self._folder}/__0_{len(self.files)}.distcp", 0, [], {}))
        return self.files[-1]

    def _append_archive(self, file: OutputFile, archive: OutputFile) -> None:
        file.size = archive.size
        file.fixed += archive.fixed
        file.slots |= archive.slots

    def checksums(self, sums: Mapping[tuple[str, int], int]) -> dict[str, int]:
        """Return the CRC-32 of every file by its name in the folder, from those of its tensors."""
        return {Path(file.name).name: planned_file_crc32(file, sums) for file in self.files}

    def finish(self, folder: Path, common: dict[str, Any]) -> None:
        """Write ``.metadata``, ``common.pt`` and ``metadata.json`` next to the chunks."""
        (folder / METADATA).write_bytes(self.metadata())
        (folder / "common.pt").write_bytes(_saved(common))
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")

    def metadata(self) -> bytes:
        """Return the content of ``.metadata``.

        The first call imports ``torch.distributed.checkpoint``, which takes half as long as torch.
        """
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
        metadata = dcp.Metadata(entries, storage_data=storage)
        if self.mcore_data:
            metadata.mcore_data = self.mcore_data  # type: ignore[attr-defined]
        return pickle.dumps(metadata)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()  # torch.save into a file hides the cause of an error
    torch.save(value, buffer)
    return buffer.getvalue()


def split_into_chunks(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Shape, Shape]]:
    """Split a tensor along its first dimension into chunks of at most ``CHUNK_BYTES``.

    Yields offsets and sizes of each chunk.
    """
    total = byte_count(shape, dtype)
    count = shape[0]
    step = max(1, count if total <= CHUNK_BYTES else count * CHUNK_BYTES // total)
    rest = shape[1:]
    for start in range(0, count, step):
        yield (start, *(0 for _ in rest)), (min(step, count - start), *rest)
