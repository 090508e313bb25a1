"""A terminal screen that is redrawn in place and restored afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TextIO

from megatron_llmjp.formatting import shorten

ENTER = "\x1b[?1049h\x1b[?25l"
"""Alternate screen, which keeps the scrollback of the terminal, and no cursor."""
LEAVE = "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
POLL_SECONDS = 0.2
"""Time between two looks at the size of the terminal."""


def is_interactive(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """Draws frames on the alternate screen of a terminal; a context manager that restores it.

    When it ends, for whatever reason, the last frame is printed on the normal screen.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._size = self._measure()
        self._lines: Sequence[str] = ()

    def __enter__(self) -> Screen:
        """Switch to the alternate screen."""
        self._write(ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """Restore the terminal and print the last frame."""
        self._write(LEAVE + "".join(f"{line}\n" for line in self._lines))

    @property
    def columns(self) -> int:
        """Width of the terminal."""
        self._size = self._measure()
        return self._size.columns

    def draw(self, lines: Sequence[str], hint: str) -> None:
        """Replace the content of the screen; what does not fit is cut.

        Args:
            lines: the content.
            hint: line below it, which is not part of the last frame.
        """
        self._lines = lines
        self._size = size = self._measure()
        fitting = [*lines[: max(1, size.lines - 3)], "", hint]
        shown = [shorten(line, size.columns - 1) for line in fitting]
        text = "".join(f"{line}{END_OF_LINE}\n" for line in shown)
        self._write(HOME + text + END_OF_SCREEN)

    def wait(self, seconds: float, sleep: Callable[[float], None]) -> None:
        """Wait; return early if the terminal was resized."""
        while seconds > 0:
            sleep(min(POLL_SECONDS, seconds))
            seconds -= POLL_SECONDS
            if self._measure() != self._size:
                return

    def _measure(self) -> os.terminal_size:
        """Return the size of the terminal; not that of ``COLUMNS``, which does not follow it."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return os.terminal_size((80, 24))
        return size if size.columns and size.lines else os.terminal_size((80, 24))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
