"""Faults that strike inside a process of the program, before it begins to run.

``tests.faults.forks`` calls one of these functions by its name in every rank.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

UNFINISHED = re.compile(r"\.iter_\d+\.tmp")
"""Name of a checkpoint's folder while it is written."""

KINDS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")
"""System calls by which checkpoints come and go."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def strike(what: str, iteration: int, action: Callable[[Any], None]) -> None:
    """Act when the trainer begins something, such as "a step", at an iteration."""
    from megatron_llmjp.training.trainer import Trainer

    begin = Trainer._begin

    def struck(self: Any, phase: str, *rest: Any, **named: Any) -> None:
        begin(self, phase, *rest, **named)
        if phase == what and self.iteration == iteration:
            action(self)

    Trainer._begin = struck  # type: ignore[method-assign]


def die_at_call(number: int) -> None:
    """The first rank is killed just before such a system call of its, counted from its start."""
    count = [0]

    def counting(call: Any) -> Any:
        def struck(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return struck

    if rank() == 0:
        for kind in KINDS:
            setattr(os, kind, counting(getattr(os, kind)))


def die_writing(number: int, victim: str, which: int) -> None:
    """Kill just before a rank's n-th look at a checkpoint that is being written, its own counted.

    Looks are: writing a tensor or object, forcing a file of the unfinished folder to disk, renaming
    one or the folder itself. ``victim`` as in :mod:`tests.faults.forks`; "one" is the rank itself.
    """
    from megatron_llmjp.checkpoint import writer

    lock, count = threading.Lock(), [0]

    def counting(call: Any, concerns: Callable[..., bool]) -> Any:
        def struck(*arguments: Any, **named: Any) -> Any:
            if concerns(*arguments):
                with lock:  # two threads write
                    count[0] += 1
                    if count[0] == number:
                        _kill(victim)
            return call(*arguments, **named)

        return struck

    if rank() == which:
        os.replace = counting(os.replace, lambda source, _: _is_unfinished(str(source)))
        os.fsync = counting(os.fsync, lambda fd: _is_unfinished(_path_of(fd)))
        writer._write_item = counting(writer._write_item, lambda *_: True)


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _is_unfinished(path: str) -> bool:
    """Whether a path is, or is in, the folder of a checkpoint that is being written."""
    return any(UNFINISHED.fullmatch(part) for part in Path(path).parts)


def _kill(victim: str) -> None:
    """Kill this rank, its launcher, or both and all other ranks; none of them acts any more."""
    own, launcher = psutil.Process(), psutil.Process(os.getppid())
    has_launcher = "WORLD_SIZE" in os.environ
    if victim != "one" and has_launcher:
        others = [other for other in launcher.children() if other != own]
        launcher.kill()
        for other in others if victim == "all" else []:
            other.kill()
    if victim != "launcher":
        own.kill()
    time.sleep(60)  # the launcher's end is this rank's, too


def signal_at(number: int, what: str, iteration: int, which: int = 0) -> None:
    """One rank gets a signal when the trainer begins something."""
    if rank() == which:
        strike(what, iteration, lambda _: os.kill(os.getpid(), number))


def signal_group_at(number: int, what: str, iteration: int) -> None:
    """The rank and its data workers get a signal, as from a terminal, the launcher or Slurm."""
    strike(what, iteration, lambda _: os.killpg(os.getpgid(0), number))


def signal_in(number: int, name: str) -> None:
    """Every rank gets a signal when it calls a function of the package."""
    module, _, function = name.rpartition(".")
    place = importlib.import_module(f"megatron_llmjp.{module}")
    called = getattr(place, function)

    def struck(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return called(*arguments)

    setattr(place, function, struck)


def raise_at(iteration: int, which: int) -> None:
    """A rank comes upon an error."""

    def raised(_: Any) -> None:
        raise ZeroDivisionError("a cosmic ray")

    if rank() == which:
        strike("a step", iteration, raised)


def stop_at(iteration: int, which: int, grace: float) -> None:
    """A rank is stopped, as by a debugger or a machine that swaps; others wait less for it."""
    from megatron_llmjp.training import watchdog

    watchdog.GRACE_SECONDS = grace
    if rank() == which:
        strike("a step", iteration, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def delete_at(folder: str, iteration: int) -> None:
    """Somebody removes the save folder."""
    if rank() == 0:
        strike("a step", iteration, lambda _: shutil.rmtree(folder))


def taken_over_at(folder: str, iteration: int) -> None:
    """Another machine's run takes the save folder, as from one that was frozen for minutes."""
    record = Path(folder) / ".run.json"

    def take(_: Any) -> None:
        owner = {**json.loads(record.read_text()), "host": "node07", "token": "another"}
        record.write_text(json.dumps(owner))

    if rank() == 0:
        strike("a step", iteration, take)


def stale_lock(code: int) -> None:
    """Locking fails with an error of the file system, and no time passes between attempts."""
    from megatron_llmjp import filesystem

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    filesystem.fcntl.lockf = fail  # type: ignore[assignment]
    filesystem.RETRY_PAUSES = (0.0,)


def tight(what: str, iteration: int, limit: float) -> None:
    """From some moment on, so many seconds without progress are a hang."""
    from megatron_llmjp.training import watchdog

    # The watchdogs' first look after that comes a period later, of the time before.
    watchdog.GRACE_SECONDS = 2.0 + watchdog.MAX_PERIOD

    def tightened(trainer: Any) -> None:
        watch = trainer.control.watchdog
        watch._timer.limit, watch._timer.period = limit, limit / 10
        watch._heartbeats._period = limit / 10

    strike(what, iteration, tightened)


def slow_validation(iteration: int, limit: float, pause: float) -> None:
    """Each batch of a validation takes a while."""
    from megatron_llmjp.training import evaluation

    tight("a validation", iteration, limit)
    run = evaluation.run_micro_batches

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(pause)
        return run(*arguments, **named)

    evaluation.run_micro_batches = slow


def slow_write(iteration: int, limit: float, pause: float, pieces: int, which: int) -> None:
    """A rank writes some pieces of a checkpoint to a slow disk; without a pause, it hangs."""
    from megatron_llmjp.checkpoint.writer import _ChecksumStream

    write, rest = _ChecksumStream.write, [0]

    def slow(self: Any, data: Any) -> int:
        if rest[0] > 0:
            rest[0] -= 1
            time.sleep(pause or 1e6)
        return write(self, data)

    tight("a save", iteration, limit)
    if rank() == which:
        strike("a save", iteration, lambda _: rest.__setitem__(0, pieces))
        _ChecksumStream.write = slow  # type: ignore[method-assign]


def endless_loop(iteration: int, limit: float, which: int) -> None:
    """A rank computes for ever."""

    def loop(_: Any) -> None:
        while True:
            sum(range(1000))

    tight("a step", iteration, limit)
    if rank() == which:
        strike("a step", iteration, loop)


def suspended_at(iteration: int, limit: float) -> None:
    """The process is stopped, until somebody has it go on."""
    tight("a step", iteration, limit)
    strike("a step", iteration, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def endless_start(name: str) -> None:
    """A function of the package waits outside of Python, and never returns."""
    module, _, function = name.rpartition(".")
    place = importlib.import_module(f"megatron_llmjp.{module}")

    def wait(*_: Any, **__: Any) -> None:
        import torch.distributed as dist

        print("waiting for nothing", flush=True)
        dist.HashStore().wait(["never"], timedelta(hours=1))

    setattr(place, function, wait)


def started_ago(seconds: float) -> None:
    """The launcher was started so long ago."""
    from megatron_llmjp.parallel.ranks import START_TIME_VARIABLE

    os.environ[START_TIME_VARIABLE] = str(time.monotonic() - seconds)


def obstructed_save(kind: str, iteration: int, place: str = "") -> None:
    """From the save of an iteration to the next one something is in the way of writing."""
    begin, end = OBSTACLES[kind](place)
    strike("a save", iteration, lambda _: begin())
    strike("a save", iteration + 1, lambda _: end())


def clock_jumps(seconds: float) -> None:
    """The clock is set, forth and back, every few iterations; monotonic clocks go on."""
    true, jumped = time.time, [0.0]
    time.time = lambda: true() + jumped[0]  # type: ignore[assignment]
    for iteration in range(1, 100, 2):
        strike("a step", iteration, lambda _: jumped.append(jumped.pop() + seconds))
        strike("a step", iteration + 1, lambda _: jumped.append(jumped.pop() - 2 * seconds))


def nan_at(where: str, iteration: int, which: int) -> None:
    """A number of one rank is NaN: of its data, its weights or its gradients."""
    if rank() != which:
        return
    if where == "weight":
        strike("a step", iteration, lambda trainer: _first(trainer).data.view(-1)[:1].fill_(_NAN))
        return
    from megatron_llmjp.data import dataloader
    from megatron_llmjp.training import train_step

    hit: list[Any] = []
    strike("a step", iteration, hit.append)
    share, update = dataloader._broadcast_to_tensor_parallel_ranks, train_step._clip_and_update

    def shared(*arguments: Any) -> Any:
        batch = share(*arguments)
        if hit and where == "data":
            hit.clear()
            batch["loss_mask"].view(-1)[0] = _NAN
        return batch

    def updated(*arguments: Any) -> Any:
        if hit and where == "gradient":
            _first(hit.pop()).main_grad.view(-1)[0] = _NAN
        return update(*arguments)

    dataloader._broadcast_to_tensor_parallel_ranks, train_step._clip_and_update = shared, updated


def nan_weight_at(what: str, iteration: int, which: int = 0) -> None:
    """A weight of one rank is NaN from when the trainer begins something."""
    if rank() == which:
        strike(what, iteration, lambda trainer: _first(trainer).data.view(-1)[:1].fill_(_NAN))


def ids_not_searched() -> None:
    """The start finds no token id, so that the run itself meets those beyond the vocabulary."""
    from megatron_llmjp.data.folds import datasets as fold_datasets

    fold_datasets.largest_id = lambda index: None


def nan_validation() -> None:
    """A validation gives no number."""
    from megatron_llmjp.training import train as train_module

    train_module.evaluate = lambda *_, **__: {"valid": _NAN}


def gradients_times(factor: float, iteration: int) -> None:
    """Gradients are larger, or NaN, in all steps after an iteration."""
    from megatron_llmjp.training import train_step
    from megatron_llmjp.training.trainer import Trainer

    begin, update, hit = Trainer._begin, train_step._clip_and_update, []

    def begun(self: Any, phase: str, **more: Any) -> None:
        begin(self, phase, **more)
        hit[:] = [self] if self.iteration >= iteration else []

    def updated(*arguments: Any) -> Any:
        for trainer in hit:
            for chunk in trainer.model.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.mul_(factor)
        return update(*arguments)

    Trainer._begin, train_step._clip_and_update = begun, updated  # type: ignore[method-assign]


_NAN = float("nan")


def _first(trainer: Any) -> Any:
    return next(trainer.model.chunks[0].parameters())


def _file_size(_: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """``ulimit -f``: no file may grow beyond 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )


def _nobody(_: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """The folder is read-only to whoever runs: root becomes nobody."""
    return lambda: os.seteuid(65534), lambda: os.seteuid(0)


def _full(place: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """The disk is full, but for a few bytes."""
    ballast = Path(place) / f"ballast-{rank()}"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    return fill, ballast.unlink


def _quota(_: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Writing a checkpoint's tensors is refused by the user's quota."""
    from megatron_llmjp.checkpoint.writer import _ChecksumStream

    write = _ChecksumStream.write

    def refused(self: Any, data: Any) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    return (
        lambda: setattr(_ChecksumStream, "write", refused),
        lambda: setattr(_ChecksumStream, "write", write),
    )


OBSTACLES: dict[str, Callable[[str], tuple[Callable[[], None], Callable[[], None]]]] = {
    "file size": _file_size,
    "read-only": _nobody,
    "disk full": _full,
    "quota": _quota,
}
