"""Fast starts of pretrain_gpt.py, as forks of a process that has imported everything.

The forks run the whole program from command line to exit code, including launcher and ranks; only
``subprocess.Popen`` in the launcher is replaced by a fork.
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
"""Timeout in seconds, on a busy machine."""

Fault = tuple[Any, ...]
"""Name of a function in one of :data:`FAULT_MODULES`, and its arguments."""

FAULT_MODULES = tuple(
    f"tests.faults.injected_{kind}" for kind in ("interruptions", "hangs", "storage", "numbers")
)

ALSO_IN_LAUNCHER = {"skip_token_id_check"}
"""Faults that are also injected into the launcher; others are injected into the ranks only."""


class Start:
    """One start of the program, with its output."""

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
        """Process id of the launcher, or of the only process."""
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
        """Return the processes that train, without data workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.pid)
            return own.children() if self._has_launcher else [own]
        return []

    def kill(self, victim: str, draw: random.Random) -> None:
        """``kill -9`` of ``all`` processes, of ``one`` rank, or of the ``launcher``."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if victim == "all":
                processes = psutil.Process(self.pid).children(recursive=True)
                os.kill(self.pid, signal.SIGKILL)
                for found in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.kill()
            elif victim == "launcher":
                os.kill(self.pid, signal.SIGKILL)
            elif ranks := self.ranks():
                draw.choice(ranks).kill()

    def until(self, condition: Callable[[], object], pause: float = 0.001) -> bool:
        """Wait for a condition; return false if the program ended first."""
        end = time.monotonic() + SLOW
        while not condition():
            if self.is_over:
                return bool(condition())
            assert time.monotonic() < end, f"timeout:\n{self.out[-3000:]}{self.err[-3000:]}"
            time.sleep(pause)
        return True

    def wait(self, seconds: float = SLOW) -> int:
        """Return the exit code; negative for a signal."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running:\n{self.out[-3000:]}{self.err[-3000:]}"
        return code


@contextlib.contextmanager
def started(words: Sequence[Any], folder: Path, fault: Fault | None = None) -> Iterator[Start]:
    """Start the program, and kill all of its processes at the end."""
    start = Start(words, folder, fault)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(start.pid)
    try:
        yield start
    finally:
        start.kill("all", random.Random())
        start.wait()


def finish(words: Sequence[Any], folder: Path, fault: Fault | None = None) -> tuple[int, str, str]:
    """Run the program to its end; return exit code, standard output and standard error."""
    with started(words, folder, fault) as start:
        return start.wait(), start.out, start.err


@lru_cache(maxsize=1)
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",  # imported in the children, since the parent process is pytest
            "megatron_llmjp.cli",
            "megatron_llmjp.training.train",
            "torch.utils.data._utils",
            *FAULT_MODULES,
        ]
    )
    return context


def _be_program(words: list[str], out: str, err: str, fault: Fault | None) -> None:
    """Run the program in a fork."""
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
    # Writing the report takes longer than the run.
    pretrain_cli.write_report_at_end = lambda save: None  # type: ignore[assignment]
    if "--nproc-per-node" not in words or (fault and fault[0] in ALSO_IN_LAUNCHER):
        _inject(fault)
    code = pretrain_cli.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _inject(fault: Fault | None) -> None:
    if fault is not None:
        name, *arguments = fault
        modules = map(importlib.import_module, FAULT_MODULES)
        next(getattr(module, name) for module in modules if hasattr(module, name))(*arguments)


class _Fork:
    """Replacement for ``subprocess.Popen`` in the launcher."""

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
