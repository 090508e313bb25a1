"""Reader of PyTorch distributed checkpoints (torch_dist) without a process group.

A folder contains ``.metadata``, a pickle with the file, the offset and the length of every
rectangular chunk of every tensor, and ``.distcp`` files; each chunk is a ``torch.save`` archive.
Source: torch/distributed/checkpoint/{metadata,filesystem}.py; megatron-core adds ``common.pt``
and ``metadata.json`` (megatron/core/dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llmjp.checkpoint.bounded_unpickler import BoundedUnpickler
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import Extents, FileTensor
from megatron_llmjp.convert.files.torch_archive import load_archive, resolve_global
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import Shape, rectangular_parts, whole
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
_COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True)
class ChunkTensor:
    """A chunk of a tensor, or of one layer of stacked layers: an archive in a ``.distcp`` file."""

    path: Path
    offset: int
    length: int
    shape: Shape
    dtype: DType
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
    dtype: DType
    chunks: dict[tuple[Shape, Shape], tuple[Path, int, int]]
    files: Mapping[Path, ChecksumRange] = field(default_factory=dict)
    """Files with a known CRC-32."""

    def tensor_read(self, lead: Shape = ()) -> TensorRead:
        """Return how to read the tensor, or one part of a stack.

        Args:
            lead: indices of the part: of the layer in ``[layers, ...]``, and of the expert.

        Raises:
            UserError: the chunks do not cover the tensor.
        """
        dims = len(lead)
        wanted = {
            (offsets[dims:], sizes[dims:]): place
            for (offsets, sizes), place in self.chunks.items()
            if offsets[:dims] == lead and all(size == 1 for size in sizes[:dims])
        }
        shape = self.shape[dims:]
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
