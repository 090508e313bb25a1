"""Decompression of input files, detected by content, and names of unsupported formats."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from data_tools.preprocess.input.sources import InputSource
from megatron_llmjp.errors import UserError

HEAD_BYTES = 16
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")
_COMPRESSED = (".br", ".sz", ".snappy", ".z", ".lz", ".lzo")
OTHER_SUFFIXES = (*_ARCHIVES, *_COMPRESSED, ".arrow", ".feather", ".orc", ".avro")
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x02\x21\x4c\x18": "LZ4's legacy format",
    b"\xff\x06\x00\x00sNaPpY": "Snappy",
    b"\x1f\x9d": "the format of compress",
    b"LZIP": "lzip",
    b"\x89LZO": "lzop",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
}
_SKIPPABLE = (
    b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f: a frame without text, such as pzstd's first
)
_SUPPORTED = "Supported: JSON lines (plain, gzip, bzip2, xz, lzma, zstd or lz4) and Parquet"


def find_opener(source: InputSource, head: bytes) -> Callable[[Any], Any] | None:
    """Return the decompressor of a compressed file, or None for an uncompressed file.

    Args:
        source: the file; its name is used only if its contents are ambiguous.
        head: its first bytes.

    Raises:
        UserError: the format is not supported.
    """
    name = source.name.lower()
    for magic, kind in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UserError(
                f"{source.name}: {kind} is not supported. {_SUPPORTED}: convert the file first."
            )
    if name.endswith(OTHER_SUFFIXES):
        raise UserError(f"{source.name}: unsupported file type. {_SUPPORTED}.")
    skippable = head[1:4] == _SKIPPABLE and head[0] >> 4 == 5
    if head.startswith(b"\x04\x22\x4d\x18") or (skippable and name.endswith(".lz4")):
        return lambda file: _open_lz4(source, file)
    if skippable:
        return ZstdReader
    # The older lzma format has no magic number: it starts with properties and a dictionary size.
    named = name.endswith(".lzma") and head[:1] not in b"{[ \t\r\n"
    if named or head.startswith(b"\x5d\x00\x00"):
        return lzma.LZMAFile
    return next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)


def _open_gzip(file: BinaryIO) -> Any:
    """Return a reader of a gzip file: isal's if it is installed, which is several times faster."""
    try:
        from isal import igzip, isal_zlib
    except ImportError:
        return gzip.GzipFile(fileobj=file)
    return IsalReader(igzip.IGzipFile(fileobj=file), isal_zlib.error)


class IsalReader:
    """Reader of a gzip file with isal, whose errors are converted to those of zlib."""

    def __init__(self, stream: Any, error: Any) -> None:
        self._stream, self._error = stream, error

    def read(self, size: int) -> bytes:
        """Return decompressed bytes, b"" at the end."""
        try:
            data: bytes = self._stream.read(size)
        except self._error as error:
            raise zlib.error(str(error)) from error
        return data


def _open_lz4(source: InputSource, file: BinaryIO) -> Any:
    try:
        import lz4.frame
    except ImportError as error:
        raise UserError(
            f"{source.name}: reading LZ4 requires the lz4 package (pip install lz4); or compress "
            "the file with zstd"
        ) from error
    return Lz4Reader(lz4.frame.LZ4FrameFile(file))


class Lz4Reader:
    """Reader of an LZ4 stream, whose library raises RuntimeError for damaged data."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        """Return decompressed bytes, b"" at the end."""
        try:
            data: bytes = self._stream.read(size)
        except RuntimeError as error:
            raise EOFError(str(error)) from error
        return data


class ZstdReader:
    """Reader of a zstd stream with any number of frames, which detects truncated streams.

    Arrow's reader, because it decompresses no more than is read: 4 bytes can expand to 128 KiB.
    """

    def __init__(self, file: BinaryIO) -> None:
        try:
            import pyarrow
        except ImportError as error:
            raise UserError("reading zstd requires pyarrow: pip install pyarrow") from error
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    def read(self, size: int) -> bytes:
        """Return decompressed bytes, b"" at the end."""
        data: bytes = self._stream.read(size)
        return data


_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": _open_gzip,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": ZstdReader,
}
