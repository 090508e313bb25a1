"""Injected hangs, and slow operations that are not hangs."""

from __future__ import annotations

import importlib
import os
import signal
import time
from datetime import timedelta
from typing import Any

from tests.faults.injection import inject_at, rank


def stop_at(iteration: int, which: int, grace: float) -> None:
    """Stop a rank with SIGSTOP, and shorten the grace period of the others."""
    from megatron_llmjp.training import watchdog

    watchdog.GRACE_SECONDS = grace
    if rank() == which:
        inject_at("a step", iteration, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def shorten_hang_limit(what: str, iteration: int, limit: float) -> None:
    """Set the hang limit to ``limit`` seconds from a phase on."""
    from megatron_llmjp.training import watchdog

    # The first check afterwards still uses the previous period.
    watchdog.GRACE_SECONDS = 2.0 + watchdog.MAX_PERIOD

    def tightened(trainer: Any) -> None:
        watch = trainer.control.watchdog
        watch._timer.limit, watch._timer.period = limit, limit / 10
        watch._heartbeats._period = limit / 10

    inject_at(what, iteration, tightened)


def slow_validation(iteration: int, limit: float, pause: float, batches: int) -> None:
    """Delay the first batches of the validation after an iteration."""
    from megatron_llmjp.training import evaluation

    shorten_hang_limit("a validation", iteration, limit)
    run, remaining = evaluation.run_micro_batches, [0]

    def slow(*arguments: Any, **named: Any) -> Any:
        if remaining[0] > 0:
            remaining[0] -= 1
            time.sleep(pause)
        return run(*arguments, **named)

    inject_at("a validation", iteration, lambda _: remaining.__setitem__(0, batches))
    evaluation.run_micro_batches = slow


def slow_write(iteration: int, limit: float, pause: float, pieces: int, which: int) -> None:
    """Delay some writes of a checkpoint on one rank; without a pause, hang in the first."""
    from megatron_llmjp.checkpoint.writer import _ChecksumStream

    write, remaining = _ChecksumStream.write, [0]

    def slow(self: Any, data: Any) -> int:
        if remaining[0] > 0:
            remaining[0] -= 1
            time.sleep(pause or 1e6)
        return write(self, data)

    shorten_hang_limit("a save", iteration, limit)
    if rank() == which:
        inject_at("a save", iteration, lambda _: remaining.__setitem__(0, pieces))
        _ChecksumStream.write = slow  # type: ignore[method-assign]


def endless_loop(iteration: int, limit: float, which: int) -> None:
    """Run an endless loop on one rank."""

    def loop(_: Any) -> None:
        while True:
            sum(range(1000))

    shorten_hang_limit("a step", iteration, limit)
    if rank() == which:
        inject_at("a step", iteration, loop)


def suspended_at(iteration: int, limit: float) -> None:
    """Stop the process with SIGSTOP; the test continues it."""
    shorten_hang_limit("a step", iteration, limit)
    inject_at("a step", iteration, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def hang_in_function(name: str) -> None:
    """Replace a function of the package by an endless wait in C++ code."""
    module, _, function = name.rpartition(".")
    place = importlib.import_module(f"megatron_llmjp.{module}")

    def wait(*_: Any, **__: Any) -> None:
        import torch.distributed as dist

        print("waiting forever", flush=True)
        dist.HashStore().wait(["never"], timedelta(hours=1))

    setattr(place, function, wait)
