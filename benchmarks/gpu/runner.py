"""Runs parts in processes of their own, with time limits, and collects their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.parts import Part, find_part

ROOT = Path(__file__).resolve().parents[2]

SKIPPED_EXIT_CODE = 77
"""Exit code of a part that this machine cannot run."""

MESSAGE_LINES = 4
POLL_SECONDS = 0.05


class Process(Protocol):
    """A running part, with all processes that it started."""

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""

    def kill(self) -> None:
        """End it and its children, and wait for the end."""


StartFunction = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts ``python ARGUMENTS`` with an environment, and both output streams in a log file."""


class NewSession:
    """A process in a session of its own, so that its children end with it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End the session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class Runner:
    """Starts parts with the same settings."""

    device: str
    scale: str
    folder: Path
    """Folder of all output."""
    work: Path
    """Folder for data and checkpoints."""
    start: StartFunction = NewSession

    def run(self, part: Part, seconds: float) -> dict[str, Any]:
        """Run a part for at most ``seconds``, and return its entry of the report."""
        began = time.monotonic()
        companion = self._start(find_part(part.alongside)) if part.alongside else None
        process = self._start(part)
        try:
            while (code := process.poll()) is None and time.monotonic() - began < seconds:
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            if companion is not None:
                companion.kill()
        entry: dict[str, Any] = {"title": part.title, **self._status(part, code, seconds)}
        entry["seconds"] = round(time.monotonic() - began, 1)
        with suppress(OSError, ValueError):  # it ended before its first row
            entry |= json.loads(self._result(part).read_text(encoding="utf-8"))
        return entry

    def _status(self, part: Part, code: int | None, seconds: float) -> dict[str, str]:
        if code == 0:
            return {"status": "done", "message": ""}
        if code is None:
            return {"status": "time limit", "message": f"{seconds:.0f} s; the rows so far"}
        lines = self._log(part).read_text(errors="replace").split("\n")
        message = " ".join([line.strip() for line in lines if line.strip()][-MESSAGE_LINES:])
        if code == SKIPPED_EXIT_CODE:
            return {"status": "skipped", "message": message}
        return {"status": "failed", "message": f"exit code {code}: {message}"[-600:]}

    def _start(self, part: Part) -> Process:
        self._result(part).unlink(missing_ok=True)
        device = "cpu" if part.function.endswith(":train_references") else self.device
        words = ["-m", "benchmarks.gpu", "--run-part", part.name, "--device", device]
        words += ["--scale", self.scale, "--output", str(self.folder), "--work", str(self.work)]
        environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
        return self.start(words, environment, self._log(part))

    def _result(self, part: Part) -> Path:
        return self.folder / "parts" / f"{part.name}.json"

    def _log(self, part: Part) -> Path:
        return self.folder / "logs" / f"{part.name}.log"
