"""Injected kills, signals, errors and clock changes.

``tests.faults.forks`` calls a function by its name in every rank before the program starts."""

from __future__ import annotations

import importlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.faults.injection import inject_at, rank

UNFINISHED = re.compile(r"\.iter_\d+\.tmp")
"""Name of a checkpoint folder while it is written."""


KINDS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")
"""System calls that create and remove checkpoints."""


def kill_at_call(number: int) -> None:
    """Kill the first rank just before its n-th call of :data:`KINDS`."""
    count = [0]

    def counting(call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    if rank() == 0:
        for kind in KINDS:
            setattr(os, kind, counting(getattr(os, kind)))


def kill_while_writing(number: int, victim: str, which: int) -> None:
    """Kill just before a rank's n-th operation on a checkpoint that is being written.

    Operations are writing a tensor or object, and ``fsync`` and renames in the unfinished folder.
    ``victim`` as in :mod:`tests.faults.forks`; "one" is the rank itself.
    """
    from megatron_llmjp.checkpoint import writer

    lock, count = threading.Lock(), [0]

    def counting(call: Any, concerns: Callable[..., bool]) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if concerns(*arguments):
                with lock:  # two threads write
                    count[0] += 1
                    if count[0] == number:
                        _kill(victim)
            return call(*arguments, **named)

        return wrapped

    if rank() == which:
        os.replace = counting(os.replace, lambda source, _: _is_unfinished(str(source)))
        os.fsync = counting(os.fsync, lambda fd: _is_unfinished(_path_of(fd)))
        writer._write_item = counting(writer._write_item, lambda *_: True)


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _is_unfinished(path: str) -> bool:
    """Return whether a path is in the folder of a checkpoint that is being written."""
    return any(UNFINISHED.fullmatch(part) for part in Path(path).parts)


def _kill(victim: str) -> None:
    """Kill this rank, its launcher, or all ranks and the launcher."""
    own, launcher = psutil.Process(), psutil.Process(os.getppid())
    has_launcher = "WORLD_SIZE" in os.environ
    if victim != "one" and has_launcher:
        others = [other for other in launcher.children() if other != own]
        launcher.kill()
        for other in others if victim == "all" else []:
            other.kill()
    if victim != "launcher":
        own.kill()
    time.sleep(60)  # this rank ends with the launcher


def signal_at(number: int, what: str, iteration: int, which: int = 0) -> None:
    """Send a signal to one rank when the trainer begins a phase."""
    if rank() == which:
        inject_at(what, iteration, lambda _: os.kill(os.getpid(), number))


def signal_group_at(number: int, what: str, iteration: int) -> None:
    """Send a signal to the rank and its data workers, as a terminal or Slurm does."""
    inject_at(what, iteration, lambda _: os.killpg(os.getpgid(0), number))


def signal_in_function(number: int, name: str) -> None:
    """Send a signal to every rank when it calls a function of the package."""
    module, _, function = name.rpartition(".")
    place = importlib.import_module(f"megatron_llmjp.{module}")
    called = getattr(place, function)

    def wrapped(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return called(*arguments)

    setattr(place, function, wrapped)


def raise_at(iteration: int, which: int) -> None:
    """Raise an error on one rank."""

    def raised(_: Any) -> None:
        raise ZeroDivisionError("injected")

    if rank() == which:
        inject_at("a step", iteration, raised)


def start_time_ago(seconds: float) -> None:
    """Set the start time of the launcher to ``seconds`` ago."""
    from megatron_llmjp.parallel.ranks import START_TIME_VARIABLE

    os.environ[START_TIME_VARIABLE] = str(time.monotonic() - seconds)


def set_clock(seconds: float) -> None:
    """Set the clock forward and back at every iteration, except monotonic clocks."""
    true, jumped = time.time, [0.0]
    time.time = lambda: true() + jumped[0]  # type: ignore[assignment]
    for iteration in range(1, 100, 2):
        inject_at("a step", iteration, lambda _: jumped.append(jumped.pop() + seconds))
        inject_at("a step", iteration + 1, lambda _: jumped.append(jumped.pop() - 2 * seconds))
