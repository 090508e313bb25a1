"""Launcher of the ranks of one machine (``--nproc-per-node``) that preserves exit codes.

torchrun replaces every exit code by 1 and prints its own report below the cause. Here the exit code
of the first rank that fails becomes that of the run, all other ranks are stopped immediately, and
signals are forwarded to every rank.
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
"""Time that ranks have to exit by themselves before they are killed."""


def launch(command: Sequence[str], processes: int) -> int:
    """Run ``command`` as ``processes`` ranks of one world and wait for them.

    Returns:
        0 if all ranks exit with 0, else the exit code of the rank that failed first; 130 after
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
            if forwarded:  # the signal arrived before this rank was started
                _signal(ranks[-1:], forwarded[-1])
        return _wait(ranks, forwarded)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop(ranks)


def _start(command: Sequence[str], rank: int, world: int, port: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, **rank_environment(rank, world, port)}
    # By default every rank would start one thread per core.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    # In a new session, so that a terminal's Ctrl-C reaches the ranks only through forward().
    return subprocess.Popen(list(command), env=env, start_new_session=True)


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the environment variables that define a rank of this machine."""
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
    """Report a rank that was killed by a signal; a rank that failed by itself has printed why."""
    if signal.SIGINT in forwarded and code in (-signal.SIGINT, 128 + signal.SIGINT):
        print("stopped by Ctrl-C: all ranks", file=sys.stderr)
        return 128 + signal.SIGINT
    if code < 0:
        name = signal.Signals(-code).name
        if -code in forwarded:  # before the rank installed its signal handlers
            print(f"stopped: received {name}; nothing new to save", file=sys.stderr)
            return EXIT_REQUEUE
        print(f"error: rank {rank} was killed by {name}; all ranks are stopped", file=sys.stderr)
        return 1
    return code


def _stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill all ranks that are still running, with their child processes."""
    # Ranks that stop on request, or for a user error that rank 0 prints, exit at about the same
    # time: wait for them.
    end = time.monotonic() + (GRACE_SECONDS if _exited_regularly(ranks) else 0)
    while time.monotonic() < end and any(p.poll() is None for p in ranks):
        time.sleep(0.05)
    for process in ranks:
        _signal_group(process, signal.SIGKILL)  # also data workers of a rank that has exited
        process.wait()


def _exited_regularly(ranks: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether all ranks that have exited did so with an expected exit code."""
    return all(p.poll() in (None, EXIT_DONE, EXIT_USER_ERROR, EXIT_REQUEUE) for p in ranks)


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            _signal_group(process, number)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def free_port() -> int:
    """Return an unused port below the kernel's ephemeral range.

    Rank 0 listens on it only seconds later; a port of the ephemeral range could be assigned to
    another connection before that.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 16_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
