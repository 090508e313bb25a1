"""Starts of pretrain_gpt.py that cost a second: forks of a process that has imported everything.

What runs in them is the whole program from its command line to its exit code, launcher and ranks
included; only ``subprocess.Popen`` in the launcher is a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

SLOW = 120.0
"""Seconds in which anything happens, on the busiest machine."""

Fault = tuple[Any, ...]
"""Name of a function of :mod:`tests.faults.injected`, and its arguments."""

IN_THE_LAUNCHER_TOO = {"ids_not_searched"}
"""Faults of what the launcher does before it starts the ranks; others strike the ranks alone."""


class Start:
    """One start of the program, and what it writes."""

    def __init__(self, words: Sequence[Any], folder: Path, fault: Fault | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        for path in (self._out, self._err):
            path.write_text("")
        plain = [str(word) for word in words]
        self._has_launcher = "--nproc-per-node" in plain
        self._process = _context().Process(
            target=_be_program, args=(plain, str(self._out), str(self._err), fault)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the launcher, or of the only process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_over(self) -> bool:
        return self._process.exitcode is not None

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, data workers left out."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.pid)
            return own.children() if self._has_launcher else [own]
        return []

    def kill(self, victim: str, draw: random.Random) -> None:
        """``kill -9`` of ``all`` processes, of ``one`` rank, or of the ``launcher``."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if victim == "all":
                everyone = psutil.Process(self.pid).children(recursive=True)
                os.kill(self.pid, signal.SIGKILL)
                for found in everyone:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.kill()
            elif victim == "launcher":
                os.kill(self.pid, signal.SIGKILL)
            elif ranks := self.ranks():
                draw.choice(ranks).kill()

    def until(self, condition: Callable[[], object], pause: float = 0.001) -> bool:
        """Wait for a condition; False when the program ended first."""
        end = time.monotonic() + SLOW
        while not condition():
            if self.is_over:
                return bool(condition())
            assert time.monotonic() < end, f"nothing happens:\n{self.out[-3000:]}{self.err[-3000:]}"
            time.sleep(pause)
        return True

    def wait(self, seconds: float = SLOW) -> int:
        """The exit code; negative for a signal."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running:\n{self.out[-3000:]}{self.err[-3000:]}"
        return code


@contextlib.contextmanager
def started(words: Sequence[Any], folder: Path, fault: Fault | None = None) -> Iterator[Start]:
    """A start of which nothing is left in the end."""
    start = Start(words, folder, fault)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(start.pid)
    try:
        yield start
    finally:
        start.kill("all", random.Random())
        start.wait()


def finish(words: Sequence[Any], folder: Path, fault: Fault | None = None) -> tuple[int, str, str]:
    """Start, and wait for the end: exit code, standard output and standard error."""
    with started(words, folder, fault) as start:
        return start.wait(), start.out, start.err


@lru_cache(maxsize=1)
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",  # the children look at it, as their first process is pytest
            "megatron_llmjp.cli",
            "megatron_llmjp.training.train",
            "torch.utils.data._utils",
            "tests.faults.injected",
        ]
    )
    return context


def _be_program(words: list[str], out: str, err: str, fault: Fault | None) -> None:
    """The program, in a fork."""
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = ["pretrain_gpt.py", *words]
    _main(words, fault)


def _main(words: list[str], fault: Fault | None) -> None:
    from megatron_llmjp import cli as pretrain_cli
    from megatron_llmjp.parallel import launcher

    def fork(command: Any, rank: int, world: int, port: int) -> _Fork:
        return _Fork(words, launcher.rank_environment(rank, world, port), fault)

    launcher._start = fork  # type: ignore[assignment]
    # Drawing the report of a run that ends costs more than the run.
    pretrain_cli.write_report_at_end = lambda save: None  # type: ignore[assignment]
    if "--nproc-per-node" not in words or (fault and fault[0] in IN_THE_LAUNCHER_TOO):
        _inject(fault)
    code = pretrain_cli.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _inject(fault: Fault | None) -> None:
    if fault is not None:
        name, *arguments = fault
        getattr(importlib.import_module("tests.faults.injected"), name)(*arguments)


class _Fork:
    """What the launcher wants of a Popen."""

    def __init__(self, words: list[str], env: dict[str, str], fault: Fault | None) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            from megatron_llmjp.parallel.signals import handled_signals

            os.environ.update(env)
            for number in handled_signals():
                signal.signal(number, signal.SIG_DFL)
            _inject(fault)
            from megatron_llmjp import cli as pretrain_cli

            code = 1
            try:
                code = pretrain_cli.main(words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code
