"""Nothing in a checkpoint is executed: its pickles are vetted before megatron-core opens them.

A torch_dist folder holds three kinds of pickles. ``common.pt`` and the tensors are archives of
``torch.save``; megatron-core opens them with torch's ``weights_only`` unpickler, unless an
environment variable turns that off. Small objects inside the ``.distcp`` files, such as random
states, and the index ``.metadata`` are opened with Python's own unpickler, which calls whatever a
file names (torch/distributed/checkpoint/{default_planner,filesystem}.py). So each is opened here
first, by an unpickler that knows only the names that checkpoints consist of.
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
    ("pathlib._local", "PosixPath"): Path,  # of Python 3.13
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
        """An enumeration's member: Python 3.11.0 to 3.11.3 pickle ``getattr(KIND, NAME)``."""
        kind, name = arguments if len(arguments) == 2 else (None, "")
        if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
            return kind[name]
        raise unsafe_pickle_error(self._path, "builtins.getattr")


def unsafe_pickle_error(path: Path, what: str) -> UserError:
    """The message for a file that wants more than to hold data."""
    return UserError(
        f"{path}: refused: opening it would use {what}, which no checkpoint of this program needs. "
        "The file may be malicious: nothing in it was executed. Take an earlier checkpoint "
        "(--load SAVE/iter_...)"
    )


def check_pickles(folder: Path) -> None:
    """Make sure that loading a torch_dist folder executes nothing and reads only inside it.

    Raises:
        UserError: a pickle names something that is not on the list, is damaged, or the index
            names a file outside the folder.
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
            if data:  # megatron-core's layers leave empty ones
                _open_archive(path, data)


def read_index(folder: Path) -> Any:
    """torch's ``Metadata`` of a folder, opened without executing anything.

    Raises:
        UserError: it is missing, damaged, malicious, or names a file outside the folder.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as stream:
            index = _IndexUnpickler(stream, path).load()
        names = {info.relative_path for info in index.storage_data.values()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: this is no complete checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}: damaged: {error!r}") from None
    for name in sorted(names):
        if "/" in name or name in {"", ".", ".."}:
            raise UserError(f"{path}: names a file outside its folder: {name}")
    return index


def _open_archive(path: Path, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's unpickler names what it refuses, and stumbles over damage in its own ways.
        named = re.search(r"nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error))
        if named:
            raise unsafe_pickle_error(path, named[1]) from None
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None
    except Exception as error:  # as above
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or repr(error)
