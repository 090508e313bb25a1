"""Progress bar of a conversion."""

from __future__ import annotations

import sys
import time


class ProgressBar:
    """Progress bar with gigabytes, throughput and remaining time; hidden without a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done, self._begin = total, 0, time.monotonic()
        self._show = not quiet and sys.stderr.isatty()
        self._last = 0.0

    def add(self, nbytes: int) -> None:
        """Count bytes written."""
        self._done += nbytes
        now = time.monotonic()
        if self._show and (now - self._last > 0.2 or self._done == self._total):
            self._last = now
            speed = self._done / max(now - self._begin, 1e-3)
            left = (self._total - self._done) / max(speed, 1.0)
            share = self._done / max(self._total, 1)
            bar = ("#" * int(30 * share)).ljust(30)
            sys.stderr.write(
                f"\r[{bar}] {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
                f"{speed / 1e9:.2f} GB/s, {left:.0f} s left "
            )
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._show:
            sys.stderr.write("\n")
