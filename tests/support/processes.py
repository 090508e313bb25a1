"""Run a function on several ranks, or pretrain_gpt.py, in separate processes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_llmjp.parallel.launcher import free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 270.0


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """Run ``function(*arguments)`` on each rank of a gloo world and return the results by rank.

    The function is imported by name in new processes; arguments and results are JSON. If a rank
    fails, its error is raised and all others are killed.
    """
    port = free_port()
    # In pytest the module of a test file has a different name.
    place = Path(inspect.getfile(function)).resolve().relative_to(ROOT).with_suffix("")
    call = json.dumps([".".join(place.parts), function.__qualname__, arguments])
    ranks = []
    for rank in range(world_size):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        ranks.append(Rank([sys.executable, "-m", "tests.support.rank", call], env))
    return _gather(ranks, function.__qualname__, timeout)


class Rank:
    """A process that writes its output to files, since an unread pipe would block it when full."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=self._out, stderr=self._err
        )

    def output(self) -> tuple[str, str]:
        """Return standard output and standard error so far."""
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return texts[0], texts[1]


def _gather(ranks: list[Rank], name: str, timeout: float) -> list[Any]:
    end = time.monotonic() + timeout
    processes = [rank.process for rank in ranks]
    try:
        while any(process.poll() is None for process in processes):
            failed = [i for i, process in enumerate(processes) if process.poll()]
            if failed:
                output = ranks[failed[0]].output()[1]
                raise AssertionError(f"{name}: rank {failed[0]} failed:\n{output[-6000:]}")
            if time.monotonic() > end:
                waiting = [i for i, process in enumerate(processes) if process.poll() is None]
                raise AssertionError(
                    f"{name}: ranks {waiting} are still running after {timeout:.0f} s"
                )
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    outputs = [rank.output() for rank in ranks]
    for number, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"{name}: rank {number} failed:\n{output[1][-6000:]}"
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


def pretrain(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``pretrain_gpt.py`` to its end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=cwd,
        env=env,
    )
