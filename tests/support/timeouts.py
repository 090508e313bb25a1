"""The timeout that all others derive from; ``TEST_TIMEOUT_SCALE`` scales it for a slow machine.

A timeout is reached only when a test hangs. No test requires anything to be fast.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

TIMEOUT = 300.0 * float(os.environ.get("TEST_TIMEOUT_SCALE", "1"))
"""Seconds that a test may take; those of a module's first test include its fixtures."""

PROCESS_TIMEOUT = 0.9 * TIMEOUT
"""Seconds that a process of a test may take, so that its output is shown before the test ends."""


def wait_until(condition: Callable[[], object], pause: float = 0.02) -> None:
    """Wait for a condition, checking it every ``pause`` seconds."""
    end = time.monotonic() + PROCESS_TIMEOUT
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(pause)
