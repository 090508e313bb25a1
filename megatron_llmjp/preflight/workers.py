"""Processes with a time limit: calls and commands that may hang on a sick node.

A process that waits for a hung driver or file system cannot be killed (state D); it is abandoned,
never waited for. Workers are forked from a process that has imported torch, but has no threads and
has not initialized CUDA.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("fork")
_POLL_SECONDS = 0.05
_KILL_SECONDS = 2.0


class WorkerError(Exception):
    """A worker failed, or did not end in time."""


def call_all(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    seconds: float,
    interrupted: Callable[[], str] = lambda: "",
) -> list[Any]:
    """Call a function in one process per tuple of arguments, and return the results.

    Args:
        function: the function; its results are picklable.
        arguments: arguments of each process.
        seconds: time limit for all of them.
        interrupted: returns why to stop waiting, or nothing.

    Raises:
        WorkerError: a worker raised an error or died, the time is over, or ``interrupted`` gave a
            reason. All workers are killed.
    """
    processes, results = [], []
    for values in arguments:
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_work, args=(function, values, sender), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        results.append(receiver)
    try:
        return _collect(results, time.monotonic() + seconds, seconds, interrupted)
    finally:
        _kill([process.pid for process in processes if process.pid is not None])
        for process in processes:
            process.join(_KILL_SECONDS)


def _collect(
    results: list[Connection], end: float, seconds: float, interrupted: Callable[[], str]
) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(results):
        waiting = [one for i, one in enumerate(results) if i not in found]
        for ready in wait(waiting, _POLL_SECONDS):
            index = results.index(ready)  # type: ignore[arg-type]
            try:
                is_error, value = results[index].recv()
            except EOFError:
                raise WorkerError(f"process {index} died") from None
            if is_error:
                raise WorkerError(value)
            found[index] = value
        if len(found) < len(results):
            if reason := interrupted():
                raise WorkerError(reason)
            if time.monotonic() > end:
                raise WorkerError(f"not finished after {seconds:.0f} s")
    return [found[index] for index in range(len(results))]


def _work(function: Callable[..., Any], values: tuple[Any, ...], sender: Connection) -> None:
    """Run the function in a process group of its own, and send its result or error."""
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        sender.send((False, function(*values)))
    except BaseException as error:
        sender.send((True, shorten(f"{type(error).__name__}: {error}")))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def run_command(command: Sequence[str], seconds: float) -> str:
    """Run a command and return its output.

    Raises:
        RuntimeError: it fails, does not end in time, or does not exist.
    """
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from None
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"{command[0]} does not answer within {seconds:.0f} s") from None
    if process.returncode:
        raise RuntimeError(f"{command[0]}: {(errors or output).strip()}")
    return output


def shorten(text: str, most: int = 300) -> str:
    """Return the first lines of an error message as one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
