"""Reading what ``torch.save`` wrote, without running anything that the file names.

A file of ``torch.save`` is a zip archive of stored (uncompressed) entries: a pickle and one entry
per storage (torch/serialization.py). Its pickle is opened here with an unpickler that builds plain
containers, argparse namespaces and descriptions of tensors. Classes of training programs become
inert records, so neither ``megatron`` nor ``deepspeed`` needs to be installed; anything else that
a pickle could call is refused. Tensors stay in the file until they are read.
"""

from __future__ import annotations

import argparse
import builtins
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.storage import FileTensor, truncation_error
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_INERT_PACKAGES = frozenset(
    {"megatron", "deepspeed", "megatron_llmjp", "torch", "numpy", "pathlib", "transformer_engine"}
)
_PLAIN_BUILTINS = frozenset(
    {
        "set",
        "frozenset",
        "slice",
        "complex",
        "bytearray",
        "range",
        "dict",
        "list",
        "tuple",
        "int",
        "float",
        "bool",
        "str",
        "bytes",
        "object",
    }
)


class InertObject:
    """An inert stand-in for an object of a class that is not imported: its state as attributes."""

    kind = "object"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args
        self.__dict__.update(kwargs)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict | None):
            state = {**(state[0] or {}), **(state[1] or {})}
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def append(self, value: Any) -> None:
        """Ignore list items: the record stands for a container of no interest."""

    def extend(self, values: Any) -> None:
        """Ignore list items."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore mapping items."""

    def __hash__(self) -> int:
        return id(self)


class _StorageRef(NamedTuple):
    dtype: torch.dtype
    key: str


def load_archive(
    path: Path,
    offset: int = 0,
    length: int | None = None,
    checksum_range: ChecksumRange | None = None,
) -> Any:
    """Open an archive that is a file, or a part of one.

    Args:
        path: the file.
        offset: where the archive begins, in bytes.
        length: its size; the rest of the file when not given.
        checksum_range: has the checksum of the whole file; otherwise each storage has that of
            its entry,
            if the archive has any.

    Returns:
        The pickled object, with a :class:`FileTensor` in place of every tensor.

    Raises:
        UserError: the file is truncated, not of this format, or names a foreign callable.
    """
    try:
        with path.open("rb") as stream:
            window = _Window(stream, offset, length)
            archive = zipfile.ZipFile(window)
            places = _entry_places(archive, window, offset)
            root = next(n for n in places if PurePosixPath(n).name == "data.pkl")
            folder = root.rsplit("/", 1)[0]
            contents = _read_entry(archive, window, root, places[root][0] - offset)
            checksum_ranges = _checksum_ranges(path, archive, places, checksum_range)
            return _Unpickler(io.BytesIO(contents), path, folder, places, checksum_ranges).load()
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except (zipfile.BadZipFile, StopIteration, struct.error, EOFError) as error:
        if offset == 0 and _is_old_format(path):
            raise UserError(
                f"{path}: in the format of torch before 1.6; load and save it with a newer torch"
            ) from None
        raise UserError(f"{path}: damaged or truncated ({error or 'no data.pkl'})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: damaged pickle ({error})") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: damaged ({error!r})") from error


def _checksum_ranges(
    path: Path,
    archive: zipfile.ZipFile,
    places: dict[str, tuple[int, int]],
    whole: ChecksumRange | None,
) -> Mapping[str, ChecksumRange]:
    """The checksum that covers each entry. torch leaves them 0 where they are switched off."""
    if whole is not None:
        return dict.fromkeys(places, whole)
    return {
        entry.filename: ChecksumRange(path, *places[entry.filename], entry.CRC, entry.filename)
        for entry in archive.infolist()
        if entry.CRC
    }


def _read_entry(archive: zipfile.ZipFile, window: _Window, name: str, start: int) -> bytes:
    entry = archive.getinfo(name)
    if entry.CRC:
        return archive.read(name)
    # Files whose manifest sums them whole have no sums inside (torch's set_crc32_options).
    window.seek(start)
    return window.read(entry.file_size)


class _Window(io.RawIOBase):
    """A part of a file that looks like a file of its own."""

    def __init__(self, stream: Any, start: int, length: int | None) -> None:
        self._stream, self._start = stream, start
        end = stream.seek(0, io.SEEK_END)
        self._size = end - start if length is None else length
        if start + self._size > end:
            raise truncation_error(Path(stream.name), start + self._size)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._start + self._position)
        data: bytes = self._stream.read(count)
        self._position += len(data)
        return data


def _entry_places(
    archive: zipfile.ZipFile, window: _Window, base: int
) -> dict[str, tuple[int, int]]:
    """Offset in the file and size of the data of every entry."""
    places = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch.save never does")
        window.seek(entry.header_offset)
        header = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
        places[entry.filename] = (base + start, entry.file_size)
    return places


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        stream: io.BytesIO,
        path: Path,
        folder: str,
        places: dict[str, tuple[int, int]],
        checksum_ranges: Mapping[str, ChecksumRange],
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self._path, self._folder, self._places = path, folder, places
        self._checksum_ranges = checksum_ranges

    def find_class(self, module: str, name: str) -> Any:
        return resolve_global(module, name, self._path, self._rebuild)

    def persistent_load(self, pid: Any) -> _StorageRef:
        kind, storage, key = pid[0], pid[1], pid[2]
        if kind != "storage" or not isinstance(storage, torch.dtype):
            raise UserError(f"{self._path}: a storage of a kind that is not known: {pid!r}")
        return _StorageRef(storage, str(key))

    def _rebuild(
        self, storage: _StorageRef, offset: int, shape: Shape, stride: Shape, *_: Any
    ) -> FileTensor:
        name = f"{self._folder}/data/{storage.key}"
        if name not in self._places:
            raise UserError(f"{self._path}: damaged: the data of a tensor ({name}) is missing")
        start, size = self._places[name]
        shape, stride = tuple(shape), tuple(stride)
        itemsize = storage.dtype.itemsize
        reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if all(shape) and reach * itemsize > size:
            raise UserError(f"{self._path}: damaged: a tensor {shape} exceeds its storage")
        return FileTensor(
            self._path,
            start + offset * itemsize,
            shape,
            storage.dtype,
            None if _is_contiguous(shape, stride) else stride,
            self._checksum_ranges.get(name),
        )


def resolve_global(
    module: str, name: str, path: Path, rebuild: Callable[..., Any] | None = None
) -> Any:
    """What a name in a pickle stands for; the allow-list.

    Raises:
        UserError: the name is not known to be harmless.
    """
    package = module.partition(".")[0]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2") and rebuild is not None:
        return rebuild
    if module == "torch._utils" and name in {"_rebuild_parameter", "_rebuild_parameter_with_state"}:
        return _first
    if module in {"torch", "torch.storage"} and name in _STORAGES:
        return _STORAGES[name]
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if (module, name) == ("torch", "Size"):
        return torch.Size
    if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
        return _without_type
    if (module, name) == ("signal", "Signals"):
        return _inert_class(module, name)
    if (module, name) == ("collections", "OrderedDict"):
        return OrderedDict
    if (module, name) == ("collections", "defaultdict"):
        return _inert_class(module, name)
    if (module, name) == ("argparse", "Namespace"):
        return argparse.Namespace
    if module in {"builtins", "__builtin__"} and name in _PLAIN_BUILTINS:
        return getattr(builtins, name)
    if (module, name) == ("_codecs", "encode"):
        return _encode
    if package in _INERT_PACKAGES:
        return _inert_class(module, name)
    if module in {"builtins", "__builtin__"} and name == "getattr":
        return partial(_member, path)
    raise _refusal(path, f"{module}.{name}")


def _refusal(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: refused: it would call {what}, which no checkpoint needs. "
        "Do not load this file with torch.load either unless you trust its origin"
    )


def _member(path: Path, *arguments: Any) -> InertObject:
    """An enumeration's member: Python 3.11.0 to 3.11.3 pickle ``getattr(KIND, NAME)``."""
    kind, name = arguments if len(arguments) == 2 else (None, None)
    if isinstance(kind, type) and issubclass(kind, InertObject) and isinstance(name, str):
        return kind(name)
    raise _refusal(path, "builtins.getattr")


def _inert_class(module: str, name: str) -> type[InertObject]:
    return type(name.rpartition(".")[2], (InertObject,), {"kind": f"{module}.{name}"})


def _without_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, which Megatron-LM puts on its fp32 masters, without them.

    The function is what :func:`resolve_global` gave for a name in the same pickle.
    """
    return function(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding not in {"utf-8", "utf8"} else "utf-8")


def _is_contiguous(shape: Shape, stride: Shape) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _is_old_format(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x80\x02"
