"""The command that ``--follow`` runs for each converted checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

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
        """End the command and its children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            if self.wait(STOP_SECONDS) is not None:
                break
