"""Writer of PyTorch distributed checkpoints (torch_dist) without a process group.

The format is described in ``torch_dist.py``.
"""

from __future__ import annotations

import argparse
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_llmjp.convert.files.checksums import combine_crc32
from megatron_llmjp.convert.files.dcp_metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorStorageMetadata,
)
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import byte_count
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.files.torch_dist import METADATA
from megatron_llmjp.convert.files.torch_pickle import dump_torch_pickle
from megatron_llmjp.convert.plan import OutputFile, Slot
from megatron_llmjp.convert.tensors import Shape

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


class TorchDistWriter:
    """Layout of a distributed checkpoint: tensor chunks and objects in files of limited size.

    Call :meth:`add_tensor` and :meth:`add_object`, then write the tensors of :attr:`files`, then
    call :meth:`finish`.
    """

    def __init__(self, max_file_size: int, folder: str) -> None:
        self._limit, self._folder = max_file_size, folder
        self.files: list[OutputFile] = []
        self._storage: dict[tuple[str, Shape | None, int | None], tuple[str, int, int]] = {}
        self._tensors: dict[str, tuple[Shape, DType, list[tuple[Shape, Shape]]]] = {}
        self._objects: list[str] = []
        self.mcore_data: dict[str, dict[str, Any]] = {}
        """megatron-core's own metadata of tensors, by key."""

    def add_tensor(
        self, key: str, shape: Shape, dtype: DType, lead: Sequence[tuple[int, int]] = ()
    ) -> list[tuple[tuple[Shape, Shape], Slot]]:
        """Add a tensor, or one part of a stack, ``[layers, ...]`` or ``[layers, experts, ...]``.

        Args:
            key: name of the tensor in the checkpoint.
            shape: shape of the tensor, or of the part.
            dtype: type of the elements.
            lead: index and number of parts for each dimension of the stack.

        Returns:
            Offsets and sizes of the chunks, and the slot of each chunk.
        """
        first = tuple(index for index, _ in lead)
        stacked = (*(number for _, number in lead), *shape)
        found = []
        for offsets, sizes in split_into_chunks(shape, dtype):
            size = (*(1 for _ in lead), *sizes)
            slot = self.add_chunk(key, stacked, dtype, (*first, *offsets), size)
            found.append(((offsets, sizes), slot))
        return found

    def add_chunk(self, key: str, shape: Shape, dtype: DType, offsets: Shape, sizes: Shape) -> Slot:
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
        (folder / METADATA).write_bytes(self._metadata())
        (folder / "common.pt").write_bytes(_saved(common))
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")

    def _metadata(self) -> bytes:
        """Return the content of ``.metadata``."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            key: TensorStorageMetadata(dtype, shape, chunks)
            for key, (shape, dtype, chunks) in self._tensors.items()
        }
        entries |= {key: BytesStorageMetadata() for key in self._objects}
        storage = {
            MetadataIndex(*index): StorageInfo(*place) for index, place in self._storage.items()
        }
        return dump_torch_pickle(Metadata(entries, storage, self.mcore_data))


def _saved(value: Any) -> bytes:
    """Return an object in the form of ``torch.save``; torch itself is needed for tensors only."""
    if _is_plain(value):
        return plan_archive("", value).content()
    import torch

    buffer = io.BytesIO()  # torch.save into a file hides the cause of an error
    torch.save(value, buffer)
    return buffer.getvalue()


def _is_plain(value: Any) -> bool:
    """Return whether an object consists of numbers, text, containers and argparse namespaces."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return all(_is_plain(each) for item in value.items() for each in item)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | bytes)


def split_into_chunks(shape: Shape, dtype: DType) -> Iterator[tuple[Shape, Shape]]:
    """Split a tensor along its first dimension into chunks of at most ``CHUNK_BYTES``.

    Yields offsets and sizes of each chunk.
    """
    total = byte_count(shape, dtype)
    count = shape[0]
    step = max(1, count if total <= CHUNK_BYTES else count * CHUNK_BYTES // total)
    rest = shape[1:]
    for start in range(0, count, step):
        yield (start, *(0 for _ in rest)), (min(step, count - start), *rest)
