"""Run a function on several ranks, or pretrain_gpt.py, in processes of their own."""

from __future__ import annotations

import importlib
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
from tests.support.forks import ROOT, Fork, import_name, run_program
from tests.support.timeouts import PROCESS_TIMEOUT


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = PROCESS_TIMEOUT,
    stand_ins: bool = False,
) -> list[Any]:
    """Run ``function(*arguments)`` on each rank of a gloo world and return the results by rank.

    Arguments and results are JSON. If a rank fails, its error is raised and all others are killed.
    With ``stand_ins`` the packages of :data:`tests.support.forks.STAND_INS` are installed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(world_size)]
        ranks = []
        for rank, result in enumerate(results):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            call = (str(result), *import_name(function), json.dumps(arguments))
            ranks.append(Fork(_be_rank, *call, env=env, stand_ins=stand_ins))
        _wait(ranks, function.__qualname__, timeout)
        return [json.loads(result.read_text()) for result in results]


def _be_rank(result: str, module: str, name: str, arguments: str) -> None:
    function = getattr(importlib.import_module(module), name)
    Path(result).write_text(json.dumps(function(*json.loads(arguments))))


def _wait(ranks: list[Fork], name: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    try:
        while waiting := [i for i, rank in enumerate(ranks) if rank.poll() is None]:
            _assert_none_failed(ranks, name)
            if time.monotonic() > end:
                raise AssertionError(
                    f"{name}: ranks {waiting} are still running after {timeout:.0f} s"
                )
            time.sleep(0.02)
        _assert_none_failed(ranks, name)
    finally:
        for rank in ranks:
            rank.kill_all()


def _assert_none_failed(ranks: list[Fork], name: str) -> None:
    for number, rank in enumerate(ranks):
        if rank.poll():
            raise AssertionError(f"{name}: rank {number} failed:\n{rank.stderr[-6000:]}")


def pretrain(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``pretrain_gpt.py`` to its end."""
    return run_program(ROOT / "pretrain_gpt.py", *arguments, cwd=cwd)


def pretrain_in_new_interpreter(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``pretrain_gpt.py`` to its end as a user does, with the imports of a new process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT,
    )
