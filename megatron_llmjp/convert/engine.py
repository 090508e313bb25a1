"""Carrying out a plan: workers copy tensors, progress is shown, the result appears when complete.

The output is built in a hidden folder beside its final place, forced to disk, and renamed. An
interrupted conversion leaves at most that folder, which the next one starts by removing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path

from megatron_llmjp.checkpoint.manifest import sync_folder
from megatron_llmjp.convert.plan import Copy, Output, Read
from megatron_llmjp.errors import UserError


def match(reads: dict[str, Read], output: Output) -> list[Copy]:
    """Pair every tensor that is read with its place in the output.

    Raises:
        ValueError: the two sides disagree on names, which is a bug of a format.
    """
    if reads.keys() != output.writes.keys():
        odd = sorted(reads.keys() ^ output.writes.keys())
        raise ValueError(f"source and target disagree on {odd[:5]}")
    return [Copy(name, read, output.writes[name]) for name, read in reads.items()]


@contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Args:
        target: the final place, which must not exist.
        nbytes: what will be written; refused beforehand when the disk cannot hold it.

    Raises:
        UserError: the target exists, cannot be written, is being written, or does not fit.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; choose another --output or remove it")
    partial = target.with_name(f".{target.name}.partial")
    lock = _lock(target)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if nbytes > free:
            raise UserError(
                f"{target.parent}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            )
        yield partial
        _sync(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        target.with_name(f".{target.name}.lock").unlink(missing_ok=True)


def _lock(target: Path) -> int:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f".{target.name}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{target}: cannot be made: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{target}: another conversion is writing it") from None
    except OSError:
        pass  # a file system without locks: go on without
    return descriptor


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            sync_folder(path)
    sync_folder(folder)


def run(copies: Sequence[Copy], output: Output, folder: Path, workers: int, quiet: bool) -> None:
    """Make the files and copy every tensor, in ``workers`` processes.

    Raises:
        UserError: a source file is damaged, the disk is full, or a worker was killed.
    """
    for file in output.files:
        file.create(folder)
    progress = Progress(sum(copy.nbytes for copy in copies), quiet)
    for nbytes in _results(copies, folder, workers):
        progress.add(nbytes)
    progress.close()


def _results(copies: Sequence[Copy], folder: Path, workers: int) -> Iterable[int]:
    if workers <= 1:
        for copy in copies:
            yield copy.run(folder)
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        # Largest first, so that no worker is left with the embedding at the end.
        order = sorted(copies, key=lambda copy: -copy.nbytes)
        futures = [pool.submit(copy.run, folder) for copy in order]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for want of memory: use fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Have a worker end when its parent was killed: it would wait for work for ever."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """One rewritten line of gigabytes, speed and remaining time; silent without a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done, self._begin = total, 0, time.monotonic()
        self._show = not quiet and sys.stderr.isatty()
        self._last = 0.0

    def add(self, nbytes: int) -> None:
        """Count bytes written."""
        self._done += nbytes
        now = time.monotonic()
        if self._show and (now - self._last > 0.2 or self._done == self._total):
            self._last = now
            speed = self._done / max(now - self._begin, 1e-3)
            left = (self._total - self._done) / max(speed, 1.0)
            share = self._done / max(self._total, 1)
            bar = ("#" * int(30 * share)).ljust(30)
            sys.stderr.write(
                f"\r[{bar}] {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
                f"{speed / 1e9:.2f} GB/s, {left:.0f} s left "
            )
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._show:
            sys.stderr.write("\n")
