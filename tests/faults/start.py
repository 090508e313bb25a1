"""Starts of pretrain_gpt.py with an injected fault."""

from __future__ import annotations

import contextlib
import importlib
import random
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import psutil

from tests.support.forks import ROOT, Fork, be_program

Fault = tuple[Any, ...]
"""Name of a function in one of :data:`FAULT_MODULES`, and its arguments."""

FAULT_MODULES = tuple(
    f"tests.faults.injected_{kind}" for kind in ("interruptions", "hangs", "storage", "numbers")
)

ALSO_IN_LAUNCHER = {"skip_token_id_check"}
"""Faults that are also injected into the launcher; others are injected into the ranks only."""


class Start(Fork):
    """One start of the program: the launcher, or the only process."""

    def __init__(self, words: Sequence[Any], fault: Fault | None = None) -> None:
        plain = [str(word) for word in words]
        self._has_launcher = "--nproc-per-node" in plain
        super().__init__(_be_pretrain_gpt, plain, fault)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train, without data workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.pid)
            return own.children() if self._has_launcher else [own]
        return []

    def kill(self, victim: str, draw: random.Random) -> None:
        """``kill -9`` of ``all`` processes, of ``one`` rank, or of the ``launcher``."""
        if victim == "all":
            self.kill_all()
        elif victim == "launcher":
            self.send_signal(signal.SIGKILL)
        elif ranks := self.ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                draw.choice(ranks).kill()


@contextlib.contextmanager
def started(words: Sequence[Any], fault: Fault | None = None) -> Iterator[Start]:
    """Start the program, and kill all of its processes at the end."""
    start = Start(words, fault)
    try:
        yield start
    finally:
        start.kill_all()


def finish(words: Sequence[Any], fault: Fault | None = None) -> tuple[int, str, str]:
    """Run the program to its end; return exit code, standard output and standard error."""
    with started(words, fault) as start:
        return start.wait(), start.stdout, start.stderr


def _be_pretrain_gpt(words: Sequence[str], fault: Fault | None) -> None:
    from megatron_llmjp import cli

    # Writing the report takes longer than the run.
    cli.write_report_at_end = lambda save: None  # type: ignore[assignment]
    if fault is not None and fault[0] in ALSO_IN_LAUNCHER and "--nproc-per-node" in words:
        _inject(fault)
    be_program([str(ROOT / "pretrain_gpt.py"), *words], partial(_inject, fault))


def _inject(fault: Fault | None) -> None:
    if fault is not None:
        name, *arguments = fault
        modules = map(importlib.import_module, FAULT_MODULES)
        next(getattr(module, name) for module in modules if hasattr(module, name))(*arguments)
