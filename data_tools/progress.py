"""How far a run has come: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts documents, bytes and tokens, and shows them with their rates.

    MB are 10^6 bytes of decompressed input; the share done and the time left come from the bytes
    of the files on disk.
    """

    def __init__(self, total: int, done: int, log_interval: int | None) -> None:
        self.total, self.disk = total, done
        self.first_disk = done
        self.log_interval = log_interval
        self.documents = self.bytes = self.tokens = 0
        self._started = self._shown = time.monotonic()
        self._shown_documents = 0
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()

    def update(self, documents: int, size: int, tokens: int, disk: int) -> None:
        """Count what a block gave; ``disk`` is the position in all files on disk, in bytes."""
        self.documents += documents
        self.bytes += size
        self.tokens += tokens
        self.disk = disk
        if self._terminal:
            self._show_bar()
        elif self._due():
            print(self.line(), file=sys.stderr, flush=True)
            self._shown, self._shown_documents = time.monotonic(), self.documents

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def line(self) -> str:
        """Return one line on the state, beginning as Megatron-LM's does."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rates = (
            f"{self.documents / seconds:,.0f} docs/s, {self.bytes / seconds / 1e6:.2f} MB/s, "
            f"{self.tokens / seconds / 1e6:.2f} M tokens/s"
        )
        text = f"Processed {self.documents:,} documents ({rates})"
        if self.total:
            left = (self.total - self.disk) * seconds / max(self.disk - self.first_disk, 1)
            text += f", {self.disk / self.total:.1%}, {_clock(left)} left"
        return text

    def _due(self) -> bool:
        if self.log_interval is not None:
            return self.documents - self._shown_documents >= self.log_interval
        return time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES

    def _show_bar(self) -> None:
        if self._bar is None:
            from tqdm import tqdm  # here, not above: tqdm's thread must not exist before the fork

            self._bar = tqdm(
                total=self.total or None,
                initial=self.first_disk,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
                if self.total
                else "{desc} [{elapsed}]",
            )
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._bar.set_description_str(
            f"{self.documents:,} docs, {self.bytes / seconds / 1e6:.1f} MB/s, "
            f"{self.tokens / seconds / 1e6:.2f} Mtok/s",
            refresh=False,
        )
        self._bar.update(self.disk - self._bar.n)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
