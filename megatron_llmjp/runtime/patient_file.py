"""Files that wait for room on a full disk, so that a log does not end the run that it tells of."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk, the user's quota or the file-size limit takes no more."""

KEPT_BYTES = 16 << 20
"""What does not fit is kept up to here, then the oldest of it is given up."""


class PatientFile(io.RawIOBase):
    """A file that is only added to; what a full disk does not take now is written later."""

    def __init__(self, file: Path | int, warn: bool = True) -> None:
        """Open ``file``, or take a descriptor that is open; ``warn`` on standard error."""
        super().__init__()
        self.name = str(file)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._owned = not isinstance(file, int)
        self._descriptor = file if isinstance(file, int) else os.open(file, flags, 0o666)
        self._pending = bytearray()
        self._warns = warn

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def write(self, data: Any) -> int:
        """Add bytes, all of them, now or later."""
        waiting = bool(self._pending)
        self._pending += memoryview(data).cast("B")
        try:
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            del self._pending[: max(0, len(self._pending) - KEPT_BYTES)]
            if self._warns and not waiting:
                text = f"warning: {self.name} waits for room on its disk: {error.strerror}"
                with contextlib.suppress(OSError):  # standard error may lie on the same disk
                    print(text, file=sys.stderr, flush=True)
        return memoryview(data).nbytes

    def close(self) -> None:
        """Try once more to write what waits, and close."""
        if not self.closed and self._owned:
            with contextlib.suppress(OSError):
                self.write(b"")
            os.close(self._descriptor)
        super().close()


def keep_standard_streams() -> None:
    """Have standard output and error wait for room on their disk, too.

    A job's log often lies on the file system whose quota its checkpoints fill.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            patient = PatientFile(descriptor, warn=False)
            kept = io.TextIOWrapper(
                patient,
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=True,
            )
            setattr(sys, name, kept)
