"""Restricted unpickling of checkpoints, so that loading one executes no code from it.

A torch_dist folder contains three kinds of pickles. ``common.pt`` and the tensors are archives of
``torch.save``; megatron-core loads them with torch's ``weights_only`` unpickler, unless an
environment variable disables it. Small objects in the ``.distcp`` files, such as random states, and
the index ``.metadata`` are loaded with Python's unpickler, which calls any function that a file
names (torch/distributed/checkpoint/{default_planner,filesystem}.py). Therefore all of them are
first loaded here, by an unpickler with an allow-list of the names that checkpoints contain.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.serialization import _get_layout

from megatron_llmjp.checkpoint.bounded_unpickler import BoundedUnpickler
from megatron_llmjp.checkpoint.extra_states import check_is_empty, is_extra_state
from megatron_llmjp.errors import UserError

INDEX = ".metadata"
COMMON = "common.pt"
_LOCAL_HEADER_BYTES = 30
"""Size of the header before an entry of a zip archive, which ends with the lengths of two fields;
the CRC-32 in it is not used, since native files have none."""

_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): Path,
    ("pathlib._local", "PosixPath"): Path,  # Python 3.13
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                (
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                ),
            ),
            (planner, ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
        )
        for name in names
    },
}


class _IndexUnpickler(BoundedUnpickler):
    """Unpickler of ``.metadata`` with an allow-list."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in {"builtins", "__builtin__"} and name == "getattr":
            return self._member
        raise unsafe_pickle_error(self._path, f"{module}.{name}")

    def _member(self, *arguments: Any) -> Enum:
        """Return an enum member; Python 3.11.0 to 3.11.3 pickle it as ``getattr(KIND, NAME)``."""
        kind, name = arguments if len(arguments) == 2 else (None, "")
        if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
            return kind[name]
        raise unsafe_pickle_error(self._path, "builtins.getattr")


def unsafe_pickle_error(path: Path, name: str) -> UserError:
    """Return the error for a file that contains more than data."""
    return UserError(
        f"{path}: refused: loading it would use {name}, which is not on the allow-list. "
        "The file may be malicious; nothing in it was executed. Use an earlier checkpoint "
        "(--load SAVE/iter_...)"
    )


def check_pickles(folder: Path) -> None:
    """Check that loading a torch_dist folder executes no code and reads no file outside it.

    Raises:
        UserError: a pickle is damaged or names something that is not on the allow-list, or the
            index names a file outside the folder, or an extra state is not empty.
    """
    index = read_index(folder)
    _open_archive(folder / COMMON, _read_range(folder / COMMON, 0, sys.maxsize))
    storage: Mapping[Any, Any] = index.storage_data
    for place, info in storage.items():
        if isinstance(index.state_dict_metadata.get(place.fqn), metadata.BytesStorageMetadata):
            path = folder / info.relative_path
            data = _read_range(path, info.offset, info.length)
            if data:  # megatron-core's layers write empty ones
                value = _open_archive(path, data)
                if is_extra_state(place.fqn):
                    check_is_empty(f"{path}: {place.fqn}", value)


def _read_range(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as stream:
            length = min(length, os.fstat(stream.fileno()).st_size)
            stream.seek(offset)
            return stream.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_index(folder: Path) -> Any:
    """Load the index (torch's ``Metadata``) of a folder without executing code.

    Raises:
        UserError: it is missing, damaged or malicious, or names a file outside the folder.
    """
    path = folder / INDEX
    try:
        index = _IndexUnpickler(path.read_bytes(), path).load()
        names = {_checked_place(info).relative_path for info in index.storage_data.values()}
        _check_index(index)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any exception
        raise UserError(f"{path}: damaged: {repr(error)[:300]}") from None
    for name in sorted(names):
        if "/" in name or name in {"", ".", ".."}:
            raise UserError(f"{path}: names a file outside its folder: {name}")
    return index


def _checked_place(info: Any) -> Any:
    """Return an entry of the index's storage data after checks of its types.

    Raises:
        TypeError: it is not a place in a file.
    """
    numbers = (info.offset, info.length)
    is_place = isinstance(info.relative_path, str) and "\0" not in info.relative_path
    if not is_place or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise TypeError(f"{info.relative_path!r} at {info.offset!r}, length {info.length!r}")
    return info


def _check_index(index: Any) -> None:
    """Check the types of an index.

    Raises:
        TypeError, AttributeError: an entry has another type.
    """
    if not isinstance(index.state_dict_metadata, dict):
        raise TypeError("its entries are not a dictionary")
    for place in index.storage_data:
        hash(place.fqn)


def _open_archive(path: Path, data: bytes) -> Any:
    try:
        _check_structure(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The message contains the refused name; damage raises other messages.
        named = re.search(r"nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error))
        if named:
            raise unsafe_pickle_error(path, named[1]) from None
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None
    except Exception as error:  # as above
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None


class _Anything:
    """Replacement for every object of a pickle that is only checked for its structure."""

    def __new__(cls, *_: Any, **__: Any) -> _Anything:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Ignore the state."""

    def append(self, _: Any) -> None:
        """Ignore list items."""

    def extend(self, _: Any) -> None:
        """Ignore list items."""

    def __setitem__(self, *_: Any) -> None:
        """Ignore mapping items."""


class _StructureUnpickler(BoundedUnpickler):
    """Unpickler of the structure of an archive's pickle: calls and imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return _Anything

    def persistent_load(self, pid: Any) -> Any:
        return _Anything()


def _check_structure(data: bytes) -> None:
    """Refuse an archive that torch cannot load within its size in memory, or crashes on.

    Raises:
        ValueError, zipfile.BadZipFile, pickle.UnpicklingError: it is not an archive of torch.save,
            which does not compress, or its pickle is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, unlike those of torch.save")
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("its entries are larger than the file")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                start = entry.header_offset + _LOCAL_HEADER_BYTES
                start += sum(struct.unpack_from("<2H", data, start - 4))
                _StructureUnpickler(data[start : start + entry.file_size]).load()


def _first_line(error: Exception) -> str:
    return (str(error).split("\n", 1)[0] or repr(error))[:300]
