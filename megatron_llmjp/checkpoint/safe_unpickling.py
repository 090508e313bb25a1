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
import pickle
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.serialization import _get_layout

from megatron_llmjp.errors import UserError

INDEX = ".metadata"
COMMON = "common.pt"

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


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler of ``.metadata`` with an allow-list."""

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
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
            index names a file outside the folder.
    """
    index = read_index(folder)
    _open_archive(folder / COMMON, (folder / COMMON).read_bytes())
    storage: Mapping[Any, Any] = index.storage_data
    for place, info in storage.items():
        if isinstance(index.state_dict_metadata.get(place.fqn), metadata.BytesStorageMetadata):
            path = folder / info.relative_path
            with path.open("rb") as stream:
                stream.seek(info.offset)
                data = stream.read(info.length)
            if data:  # megatron-core's layers write empty ones
                _open_archive(path, data)


def read_index(folder: Path) -> Any:
    """Load the index (torch's ``Metadata``) of a folder without executing code.

    Raises:
        UserError: it is missing, damaged or malicious, or names a file outside the folder.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as stream:
            index = _IndexUnpickler(stream, path).load()
        names = {info.relative_path for info in index.storage_data.values()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any exception
        raise UserError(f"{path}: damaged: {error!r}") from None
    for name in sorted(names):
        if "/" in name or name in {"", ".", ".."}:
            raise UserError(f"{path}: names a file outside its folder: {name}")
    return index


def _open_archive(path: Path, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The message contains the refused name; damage raises other messages.
        named = re.search(r"nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error))
        if named:
            raise unsafe_pickle_error(path, named[1]) from None
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None
    except Exception as error:  # as above
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or repr(error)
