"""Content of ``.metadata`` of a PyTorch distributed checkpoint.

The classes have the names and the fields of those in torch/distributed/checkpoint/metadata.py and
filesystem.py, whose import takes as long as copying two gigabytes. They are written, and never read
from a file: ``torch_dist.py`` reads ``.metadata`` of any version.
"""

from __future__ import annotations

from typing import Any

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_pickle import Size, TorchName
from megatron_llmjp.convert.tensors import Shape

_METADATA = "torch.distributed.checkpoint.metadata"
_LAYOUT = TorchName("torch.serialization", "_get_layout")


class _Strided:
    """Pickled as ``torch.strided``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _LAYOUT, ("torch.strided",)


class _MEM_FORMAT_ENCODING:
    """Pickled as the member ``TORCH_CONTIGUOUS_FORMAT`` of torch's enumeration."""

    __module__ = _METADATA

    def __reduce__(self) -> tuple[Any, ...]:
        return _MEM_FORMAT_ENCODING, (0,)


_STRIDED, _CONTIGUOUS_FORMAT = _Strided(), _MEM_FORMAT_ENCODING()


class TensorProperties:
    """Type of a tensor; layout, gradient, memory format and pinned memory are the defaults."""

    __module__ = _METADATA

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype

    def __getstate__(self) -> tuple[Any, ...]:
        return self._dtype, _STRIDED, False, _CONTIGUOUS_FORMAT, False


class ChunkStorageMetadata:
    """Place of a chunk in its tensor."""

    __module__ = _METADATA

    def __init__(self, offsets: Shape, sizes: Shape) -> None:
        self.offsets, self.sizes = Size(offsets), Size(sizes)


class TensorStorageMetadata:
    """Type, shape and chunks of a tensor."""

    __module__ = _METADATA

    def __init__(self, dtype: DType, size: Shape, chunks: list[tuple[Shape, Shape]]) -> None:
        self.properties = TensorProperties(dtype)
        self.size = Size(size)
        self.chunks = [ChunkStorageMetadata(*chunk) for chunk in chunks]


class BytesStorageMetadata:
    """An object that is no tensor."""

    __module__ = _METADATA


class MetadataIndex:
    """Key of a chunk or object; the index is a hint."""

    __module__ = _METADATA

    def __init__(self, fqn: str, offset: Shape | None, index: int | None) -> None:
        self.fqn, self.index = fqn, index
        if offset is not None:
            self.offset = Size(offset)


class _StorageInfo:
    """Where the bytes of a chunk or object are."""

    __module__ = "torch.distributed.checkpoint.filesystem"

    def __init__(self, relative_path: str, offset: int, length: int) -> None:
        self.relative_path, self.offset, self.length = relative_path, offset, length


StorageInfo = _StorageInfo


class Metadata:
    """Tensors, objects and their places; ``mcore_data`` is megatron-core's addition."""

    __module__ = _METADATA

    def __init__(
        self,
        state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata],
        storage_data: dict[MetadataIndex, StorageInfo],
        mcore_data: dict[str, dict[str, Any]],
    ) -> None:
        self.state_dict_metadata = state_dict_metadata
        self.planner_data = None
        self.storage_data = storage_data
        self.storage_meta = None
        self.version = None
        if mcore_data:
            self.mcore_data = mcore_data
