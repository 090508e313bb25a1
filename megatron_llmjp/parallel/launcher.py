"""Start the ranks of a run on this machine: a small torchrun that passes exit codes through.

torchrun turns every exit code into 1 and buries the cause under its own report. Here the code of
the first rank that fails is the code of the run, all other ranks are stopped at once, and signals
reach every rank.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_llmjp.parallel.ranks import (
    LAUNCHER_PROCESS_VARIABLE,
    LAUNCHER_VARIABLE,
    LOCAL_LAUNCHER,
    START_TIME_VARIABLE,
    process_start_time,
)
from megatron_llmjp.parallel.signals import handled_signals

GRACE_SECONDS = 5.0
"""Time between asking ranks to stop and stopping them."""


def launch(command: Sequence[str], processes: int) -> int:
    """Run ``command`` as ``processes`` ranks of one world and wait for them.

    Returns:
        0 when all ranks end with 0, else the exit code of the rank that failed first; 130 after
        Ctrl-C.
    """
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    forwarded: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        forwarded.append(number)
        _signal(ranks, number)

    previous = {number: signal.signal(number, forward) for number in handled_signals()}
    try:
        for rank in range(processes):
            ranks.append(_start(command, rank, processes, port))
            if forwarded:  # those that were not started yet have missed it
                _signal(ranks[-1:], forwarded[-1])
        return _wait(ranks, forwarded)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop(ranks)


def _start(command: Sequence[str], rank: int, world: int, port: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, **rank_environment(rank, world, port)}
    # Without this, every rank starts a thread per core and they fight for the cores.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    # A session of its own keeps a terminal's Ctrl-C from reaching the ranks twice.
    return subprocess.Popen(list(command), env=env, start_new_session=True)


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables by which a rank on this machine knows itself and its world."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER_VARIABLE: LOCAL_LAUNCHER,
        LAUNCHER_PROCESS_VARIABLE: str(os.getpid()),
        START_TIME_VARIABLE: str(process_start_time(os.getpid())),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], forwarded: Sequence[int]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            return _report(failed[0][0], failed[0][1] or 0, forwarded)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _report(rank: int, code: int, forwarded: Sequence[int]) -> int:
    """Tell of a rank that was killed; what failed by itself has told why."""
    if signal.SIGINT in forwarded and code in (-signal.SIGINT, 128 + signal.SIGINT):
        print("stopped by Ctrl-C: all ranks", file=sys.stderr)
        return 128 + signal.SIGINT
    if code < 0:
        name = signal.Signals(-code).name
        if -code in forwarded:  # the rank was still starting, and had nothing to save
            print(f"stopped: asked by {name}; there is nothing new to save", file=sys.stderr)
            return EXIT_REQUEUE
        print(f"error: rank {rank} was killed by {name}; all ranks are stopped", file=sys.stderr)
        return 1
    return code


def _stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every rank that still runs, and what it started."""
    # Ranks that stop on request, or for a mistake that the first one tells of, end together:
    # leave them the time to do so.
    end = time.monotonic() + (GRACE_SECONDS if _in_order(ranks) else 0)
    while time.monotonic() < end and any(p.poll() is None for p in ranks):
        time.sleep(0.05)
    for process in ranks:
        _signal_group(process, signal.SIGKILL)  # a dead rank's helpers may live on
        process.wait()


def _in_order(ranks: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether every rank that ended did so by itself and with a reason."""
    return all(p.poll() in (None, EXIT_DONE, EXIT_USER_ERROR, EXIT_REQUEUE) for p in ranks)


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            _signal_group(process, number)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def free_port() -> int:
    """A port that nobody listens on, below those that kernels hand out by themselves.

    The ranks need seconds until they listen on it; a port of the kernel's range would now and then
    be gone by then, to a connection of any program.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 16_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
