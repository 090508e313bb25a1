"""Text of a part of a compressed file that consists of several independent streams.

A stream may end within a line. With P the position in the text at which the first stream of a part
starts, the part ends, and the next one begins, after the first newline at or after P: each line is
in one part, however long it is, and no part has to know the text before its first stream.
"""

from __future__ import annotations

from typing import Any, BinaryIO

from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.input.stream_codecs import StreamCodec
from megatron_llmjp.errors import UserError

READ_BYTES = 1 << 18
START_BYTES = 32  # enough for the patterns of all formats


class StreamPart:
    """Reader of the lines of a part: the streams that start in the byte range of its source.

    The searched starts of streams are compared with the real ends of the streams before them, so
    that bytes that only look like a start are an error instead of lost or invented text.
    """

    def __init__(self, source: InputSource, file: BinaryIO, codec: StreamCodec) -> None:
        assert source.end is not None
        self._name, self._file, self._codec = source.name, file, codec
        self._first, self._end, self._size = source.start, source.end, source.size
        self._stream: Any = None
        self._data, self._at = b"", 0  # read from the file, and how much of it is decompressed
        self._text = b""  # decompressed, not returned yet
        self._offset = 0  # of the data in the file
        self._crossed = False  # whether a stream of the next part was reached
        self._finished = False
        self._finished = not self._open_first()

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes of text, fewer only at the end of the part.

        Raises:
            UserError: the file cannot be divided at this place.
            EOFError: the file is truncated or damaged.
        """
        parts: list[bytes] = []
        missing = size
        while missing > 0 and (self._text or not self._finished):
            if not self._text:
                self._text = self._next_text()
            parts.append(self._text[:missing])
            self._text = self._text[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def tell(self) -> int:
        """Return the number of bytes of this part on disk that have been read."""
        return min(max(self._position, self._first), self._end) - self._first

    def _open_first(self) -> bool:
        """Open the first stream, and skip the end of a line of the part before; False if none."""
        start: int | None = 0
        if self._first:
            start = self._codec.next_stream(self._file, self._first, self._end)
        if start is None:
            return False
        self._seek(start)
        if not self._first:
            return True
        while not self._finished:
            text = self._decompress()
            if self._crossed and not text:
                # The next part starts within the same line as this one, or right at its end: the
                # first newline ends both.
                return False
            newline = text.find(b"\n") + 1
            if newline:
                self._text = text[newline:]
                return True
        return False

    def _next_text(self) -> bytes:
        """Return more text; after the last stream, only up to the first newline."""
        text = self._decompress()
        if not self._crossed or not text:
            return text
        newline = text.find(b"\n") + 1
        self._finished = self._finished or bool(newline)
        return text[:newline] if newline else text

    @property
    def _position(self) -> int:
        """Offset in the file of the first byte that is not decompressed."""
        return self._offset + self._at

    def _decompress(self) -> bytes:
        """Return text of one stream, b"" at the end of a stream; sets ``_finished`` at the end."""
        if self._stream is None and not self._begin_stream():
            return b""
        data = self._peek(self._codec.feed)
        if not data:
            raise EOFError("the last stream is incomplete")
        try:
            text: bytes = self._stream.decompress(data)
        except self._codec.errors as error:
            raise EOFError(str(error)) from error
        self._at += len(data)
        if self._stream.eof:
            self._at -= len(self._stream.unused_data or b"")
            self._stream = None
        return text

    def _peek(self, size: int) -> bytes:
        """Return the next bytes of the file, fewer only at its end."""
        data = self._data[self._at : self._at + size]
        if len(data) < size:
            self._seek(self._position)
            data = self._data[:size]
        return data

    def _seek(self, at: int) -> None:
        self._file.seek(at)
        self._data, self._offset, self._at = self._file.read(READ_BYTES), at, 0

    def _begin_stream(self) -> bool:
        """Begin the next stream; return False if the state has changed: end of file or of part."""
        if not self._codec.start.match(self._peek(START_BYTES)):
            at = self._codec.skip_padding(self._file, self._position)
            self._seek(at)
        at = self._position
        if at >= self._size or (at >= self._end and not self._crossed):
            self._finished = at >= self._size
            if not self._crossed and self._end < self._size:
                self._check_next_part(at)
            self._crossed = True
            return False
        self._stream = self._codec.decompressor()
        return True

    def _check_next_part(self, at: int) -> None:
        """Check that the next parts find the same start of a stream, or none at the file's end."""
        found = self._codec.next_stream(self._file, self._end, min(at + 1, self._size))
        if found != (at if at < self._size else None):
            raise UserError(
                f"{self._name}: the file cannot be divided at byte {self._end:,}: the next "
                f"{self._codec.name} stream starts at byte {at:,}, but a search found "
                f"{found if found is None else format(found, ',')}. Divide the file into several "
                "files, or decompress it."
            )
