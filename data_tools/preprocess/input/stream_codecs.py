"""Formats of compressed files that may consist of several independent streams, and their starts.

A gzip, zstd, bzip2, xz or lz4 file may be a concatenation of streams that can be decompressed on
their own: bgzip and concatenated .gz files, pzstd, pbzip2, concatenated .xz and .lz4 files. A file
is divided between tasks at the starts of its streams. Sources: RFC 1952, RFC 8878, the xz file
format 1.2, the LZ4 frame format 1.6, and bzip2's source for its 48-bit block magic.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

SEARCH_BYTES = 1 << 20
TRIAL_BYTES = 1 << 16
"""Bytes of a possible stream that must be decompressible; a false start fails within hundreds."""
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
"""Start of a frame without text of zstd and lz4, such as those before each frame of pzstd."""


@dataclass(frozen=True)
class StreamCodec:
    """A compressed format.

    Attributes:
        name: name of the format for messages.
        start: pattern of the first bytes of a stream.
        decompressor: returns a decompressor of one stream with ``decompress(data)``, ``eof`` and
            ``unused_data``.
        feed: bytes to decompress at a time, to limit the memory of their text.
        errors: exceptions of damaged data.
    """

    name: str
    start: re.Pattern[bytes]
    decompressor: Callable[[], Any]
    feed: int
    errors: tuple[type[Exception], ...]

    def next_stream(self, file: BinaryIO, at: int, stop: int) -> int | None:
        """Return the offset in ``[at, stop)`` at which the next stream starts, or None.

        Bytes that look like the start of a stream but cannot be decompressed are not one.
        """
        overlap = 32
        while at < stop:
            file.seek(at)
            data = file.read(min(SEARCH_BYTES, stop - at) + overlap)
            for match in self.start.finditer(data):
                found = at + match.start()
                if found < stop and self._is_decompressible(file, found):
                    return found
            if len(data) <= overlap:
                break
            at += len(data) - overlap
        return None

    def skip_padding(self, file: BinaryIO, at: int) -> int:
        """Return the offset of the first stream at or after ``at``.

        Frames without text are skipped, and zeros, with which gzip and xz files may be padded.
        """
        while True:
            file.seek(at)
            head = file.read(4096)
            if _SKIPPABLE.match(head) and len(head) >= 8:
                at += 8 + int.from_bytes(head[4:8], "little")
                continue
            zeros = len(head) - len(head.lstrip(b"\0"))
            at += zeros
            if not zeros or zeros < len(head):
                return at

    def _is_decompressible(self, file: BinaryIO, at: int) -> bool:
        """Return whether the first bytes of a possible stream can be decompressed."""
        file.seek(at)
        left, stream, text = file.read(TRIAL_BYTES), self.decompressor(), 0
        try:
            while left and not stream.eof and text < TRIAL_BYTES:
                text += len(stream.decompress(left[: self.feed]))
                left = left[self.feed :]
        except self.errors:
            return False
        return True


def find_codec(head: bytes, name: str) -> StreamCodec | None:
    """Return the format of a compressed file by its first bytes; None if it has no streams.

    Args:
        head: the first bytes.
        name: the file's name, which decides between zstd and lz4 if the first frame has no text.
    """
    if _SKIPPABLE.match(head):
        return _lz4() if name.lower().endswith(".lz4") else _zstd()
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd()
    if head.startswith(b"\x04\x22\x4d\x18"):
        return _lz4()
    return next((codec for codec in _STANDARD if codec.start.match(head)), None)


_STANDARD = (
    StreamCodec(
        "gzip",
        # Compression method 8; the flags of RFC 1952; XFL of 0, 2 or 4; a known operating system.
        re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL),
        lambda: zlib.decompressobj(wbits=31),
        4096,
        (zlib.error,),
    ),
    StreamCodec(
        "bzip2",
        re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", re.DOTALL),
        bz2.BZ2Decompressor,
        512,
        (OSError, ValueError),
    ),
    StreamCodec(
        "xz",
        re.compile(rb"\xfd7zXZ\x00\x00[\x00\x01\x04\x0a]", re.DOTALL),
        lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
        512,
        (lzma.LZMAError,),
    ),
)


def _zstd() -> StreamCodec | None:
    try:
        import zstandard
    except ImportError:
        return None
    return StreamCodec(
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd", re.DOTALL),
        lambda: zstandard.ZstdDecompressor().decompressobj(),
        512,
        (zstandard.ZstdError,),
    )


def _lz4() -> StreamCodec | None:
    try:
        import lz4.frame
    except ImportError:
        return None
    return StreamCodec(
        "lz4",
        re.compile(rb"\x04\x22\x4d\x18[\x40-\x7f]", re.DOTALL),
        lz4.frame.LZ4FrameDecompressor,
        4096,
        (RuntimeError,),
    )
