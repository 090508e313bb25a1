"""Reader of ``torch.save`` archives that executes nothing and reads no tensor data.

A file of ``torch.save`` is a zip archive of stored (uncompressed) entries: a pickle and one entry
per storage (torch/serialization.py). The unpickler here creates plain containers, argparse
namespaces and descriptions of tensors (:class:`FileTensor`). Classes of training programs become
:class:`InertObject`, so that neither ``megatron`` nor ``deepspeed`` must be installed; any other
callable in a pickle is refused.
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

from megatron_llmjp.checkpoint.bounded_unpickler import BoundedUnpickler
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import FileTensor, truncation_error
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_STORAGES = {
    "FloatStorage": DType.float32,
    "HalfStorage": DType.float16,
    "BFloat16Storage": DType.bfloat16,
    "DoubleStorage": DType.float64,
    "LongStorage": DType.int64,
    "IntStorage": DType.int32,
    "ShortStorage": DType.int16,
    "CharStorage": DType.int8,
    "ByteStorage": DType.uint8,
    "BoolStorage": DType.bool,
    "UntypedStorage": DType.uint8,
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
        "dict",
        "list",
        "tuple",
        "int",
        "float",
        "bool",
        "str",
        "object",
    }
)


class InertObject:
    """Replaces an object of a class that is not imported; its state becomes attributes."""

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
        """Ignore list items."""

    def extend(self, values: Any) -> None:
        """Ignore list items."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore mapping items."""

    def __hash__(self) -> int:
        return id(self)


class _StorageRef(NamedTuple):
    dtype: DType
    key: str


def load_archive(
    path: Path,
    offset: int = 0,
    length: int | None = None,
    checksum_range: ChecksumRange | None = None,
) -> Any:
    """Load the object of an archive, which is a file or a part of one.

    Args:
        path: the file.
        offset: start of the archive in the file, in bytes.
        length: size of the archive; default: the rest of the file.
        checksum_range: range of the whole file, if its CRC-32 is known; default: the ranges of
            the archive's entries that have a CRC-32.

    Returns:
        The pickled object, with a :class:`FileTensor` in place of every tensor.

    Raises:
        UserError: the file is truncated or not of this format, or refers to a callable that is not
            allowed.
    """
    try:
        with path.open("rb") as stream:
            file_slice = _FileSlice(stream, offset, length)
            archive = zipfile.ZipFile(file_slice)
            places = _entry_locations(archive, file_slice, offset)
            root = next(n for n in places if PurePosixPath(n).name == "data.pkl")
            folder = root.rsplit("/", 1)[0]
            contents = _read_entry(archive, file_slice, root, places[root][0] - offset)
            checksum_ranges = _checksum_ranges(path, archive, places, checksum_range)
            return _Unpickler(contents, path, folder, places, checksum_ranges).load()
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except (zipfile.BadZipFile, StopIteration, struct.error, EOFError) as error:
        if offset == 0 and _is_old_format(path):
            raise UserError(
                f"{path}: in the format of torch before 1.6, which is not supported; load it "
                "and save it again with a newer torch"
            ) from None
        problem = str(error)[:300] or "no data.pkl"
        raise UserError(f"{path}: damaged or truncated ({problem})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: damaged pickle ({str(error)[:300]})") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: damaged ({repr(error)[:300]})") from error


def _checksum_ranges(
    path: Path,
    archive: zipfile.ZipFile,
    places: dict[str, tuple[int, int]],
    whole: ChecksumRange | None,
) -> Mapping[str, ChecksumRange]:
    """Return the range with a checksum for each entry; torch writes 0 for disabled CRC-32s."""
    if whole is not None:
        return dict.fromkeys(places, whole)
    return {
        entry.filename: ChecksumRange(path, *places[entry.filename], entry.CRC, entry.filename)
        for entry in archive.infolist()
        if entry.CRC
    }


def _read_entry(archive: zipfile.ZipFile, file_slice: _FileSlice, name: str, start: int) -> bytes:
    entry = archive.getinfo(name)
    if entry.CRC:
        return archive.read(name)
    # Native files have CRC-32s in their manifest and none inside (torch's set_crc32_options).
    file_slice.seek(start)
    return file_slice.read(entry.file_size)


class _FileSlice(io.RawIOBase):
    """A part of a file as a file object."""

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


def _entry_locations(
    archive: zipfile.ZipFile, file_slice: _FileSlice, base: int
) -> dict[str, tuple[int, int]]:
    """Return the offset in the file and the size of every entry's data."""
    places = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{entry.filename} is compressed, unlike those of torch.save")
        file_slice.seek(entry.header_offset)
        header = _LOCAL_HEADER.unpack(file_slice.read(_LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
        places[entry.filename] = (base + start, entry.file_size)
    return places


class _Unpickler(BoundedUnpickler):
    def __init__(
        self,
        data: bytes,
        path: Path,
        folder: str,
        places: dict[str, tuple[int, int]],
        checksum_ranges: Mapping[str, ChecksumRange],
    ) -> None:
        super().__init__(data, encoding="utf-8")
        self._path, self._folder, self._places = path, folder, places
        self._checksum_ranges = checksum_ranges

    def find_class(self, module: str, name: str) -> Any:
        return resolve_global(module, name, self._path, self._rebuild)

    def persistent_load(self, pid: Any) -> _StorageRef:
        kind, storage, key = pid[0], pid[1], pid[2]
        if kind != "storage" or not isinstance(storage, DType):
            raise UserError(f"{self._path}: unsupported storage: {pid!r}")
        return _StorageRef(storage, str(key))

    def _rebuild(
        self, storage: _StorageRef, offset: int, shape: Shape, stride: Shape, *_: Any
    ) -> FileTensor:
        name = f"{self._folder}/data/{storage.key}"
        if name not in self._places:
            raise UserError(f"{self._path}: damaged: the data of a tensor is missing: {name}")
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
    """Return the class or function for a global of a pickle; this is the allow-list.

    Args:
        module: module of the global.
        name: name of the global in the module.
        path: the file, for messages.
        rebuild: replaces ``torch._utils._rebuild_tensor_v2``; without it, tensors are refused.

    Raises:
        UserError: the global is not on the allow-list.
    """
    package = module.partition(".")[0]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2") and rebuild is not None:
        return rebuild
    if module == "torch._utils" and name in {"_rebuild_parameter", "_rebuild_parameter_with_state"}:
        return _first_argument
    if module in {"torch", "torch.storage"} and name in _STORAGES:
        return _STORAGES[name]
    if module == "torch" and name in DType.__members__:
        return DType[name]
    if (module, name) == ("torch", "Size"):
        return tuple
    if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
        return _rebuild_without_attributes
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
    if module in {"builtins", "__builtin__"} and name in {"bytes", "bytearray"}:
        return partial(_plain_bytes, getattr(builtins, name))
    if (module, name) in {("builtins", "range"), ("__builtin__", "xrange")}:
        return _inert_class(module, name)  # a list of it could fill the memory
    if (module, name) == ("_codecs", "encode"):
        return _encode
    if package in _INERT_PACKAGES:
        return _inert_class(module, name)
    if module in {"builtins", "__builtin__"} and name == "getattr":
        return partial(_enum_member, path)
    raise _refusal(path, f"{module}.{name}")


def _refusal(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: refused: its pickle calls {name}, which is not on the allow-list. "
        "Do not load this file with torch.load either unless you trust its origin"
    )


def _enum_member(path: Path, *arguments: Any) -> InertObject:
    """Return a member of an enumeration; Python 3.11.0 to 3.11.3 pickle ``getattr(ENUM, NAME)``."""
    kind, name = arguments if len(arguments) == 2 else (None, None)
    if isinstance(kind, type) and issubclass(kind, InertObject) and isinstance(name, str):
        return kind(name)
    raise _refusal(path, "builtins.getattr")


def _inert_class(module: str, name: str) -> type[InertObject]:
    return type(name.rpartition(".")[2], (InertObject,), {"kind": f"{module}.{name}"})


def _rebuild_without_attributes(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Rebuild a tensor without its attributes, which Megatron-LM sets on fp32 main weights.

    The function was returned by :func:`resolve_global` for a global of the same pickle.
    """
    return function(*arguments)


def _first_argument(value: Any, *_: Any) -> Any:
    return value


def _plain_bytes(kind: Callable[..., Any], *arguments: Any) -> Any:
    """Create bytes from text or bytes; from a number they would be that many zeros."""
    if not all(isinstance(argument, str | bytes) for argument in arguments):
        raise pickle.UnpicklingError(f"{arguments!r} is not the content of bytes")
    return kind(*arguments)


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
