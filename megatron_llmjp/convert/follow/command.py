"""The command that ``--follow`` runs for each converted checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_llmjp.convert.follow.journal import CheckpointId

STOP_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL."""


class RunningCommand:
    """A shell command in a session of its own, so that it is stopped with its children.

    Args:
        command: the command.
        checkpoint: the checkpoint that was converted.
        folder: the converted checkpoint, ``$CHECKPOINT`` of the command; ``$ITERATION`` is the
            iteration.
    """

    def __init__(self, command: str, checkpoint: CheckpointId, folder: Path) -> None:
        self.checkpoint = checkpoint
        self._begin = time.monotonic()
        names = {"CHECKPOINT": str(folder.absolute()), "ITERATION": str(checkpoint.iteration)}
        self._process = subprocess.Popen(
            command,
            shell=True,
            env={**os.environ, **names},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def seconds(self) -> float:
        """Time since its start."""
        return time.monotonic() - self._begin

    def wait(self, timeout: float) -> int | None:
        """Wait for the exit code for some seconds; return None if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None

    def stop(self) -> None:
        """End the command and its children, those that do not end by themselves with SIGKILL."""
        try:
            self._signal(signal.SIGTERM)
            end = time.monotonic() + STOP_SECONDS
            while self._is_running() and time.monotonic() < end:
                time.sleep(0.02)
        finally:  # also at a second Ctrl-C
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _is_running(self) -> bool:
        """Whether the shell or one of its children runs: a shell ends before its children."""
        return self._process.poll() is None or any(map(self._is_child, psutil.process_iter()))

    def _is_child(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == self._process.pid:
                return process.status() != psutil.STATUS_ZOMBIE
        return False


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Let SIGINT and SIGTERM take effect after the block, whose result is then known.

    Only the main thread receives signals: in another one, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda caught, _: received.append(caught))
        yield
    finally:
        for number, handler in before.items():
            # None: not set by Python, and not known to it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for caught in received:
            signal.raise_signal(caught)
