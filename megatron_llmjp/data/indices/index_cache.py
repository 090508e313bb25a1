"""Folders of index files on disk, built once by whoever needs them first. Without torch.

Many processes on many machines may want the same index at once, on a shared file system. What is
correct and what is merely thrifty are kept apart:

Correct by renaming. Each builder writes into a folder of its own and renames it to the final name
when its files are on disk. Renaming a folder is atomic and fails where a full folder has the name
already, on NFS and Lustre as well; then the loser throws its own away. No reader ever sees half an
index, whoever dies when.

Thrifty by a lock (``filesystem.py``). Builders of the same index take it first, so that one builds
and the rest wait. It is advice only: where a file system has no locks (some Lustre mounts), holds
them per node, or keeps that of a machine that vanished (NFS 3), some work is done twice. A lock
file created with O_EXCL and a heartbeat would also outlive its dead owner, and the heartbeat stops
whenever numpy or megatron-core's helpers hold the interpreter for the minute that a large index
takes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from numpy.lib import format as npy

from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import (
    acquire_lock,
    file_crc32,
    fsync_path,
    no_heartbeat,
    process_exists,
)

CONTENTS = "contents.json"
ARRAY = ".npy"
PATIENCE_SECONDS = 600.0
"""How long another process's lock on an index that does not appear is respected."""
ABANDONED_SECONDS = 24 * 3600.0
"""Age at which the unfinished folder of another machine is taken for abandoned."""
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


class CachedIndex(Protocol):
    """Something that can be built into a cache folder, here or in another process (pickled)."""

    @property
    def folder(self) -> Path:
        """Where it lies when it is whole; the name says all that decides its contents."""

    @property
    def work(self) -> int:
        """About how long building takes: entries that are shuffled, below 0.2 us each."""

    def build(self, temporary: Path) -> None:
        """Write its files into an existing, empty folder."""


def ensure_index(
    folder: Path, build: Callable[[Path], None], *, thorough: bool = False, wait: bool = True
) -> bool:
    """Make ``folder`` by ``build(temporary)``, unless another process does or did.

    A damaged one is replaced, with a warning.

    Args:
        folder: the final place.
        build: writes the files into an existing, empty folder.
        thorough: compare checksums, not sizes only; reads the whole index.
        wait: for another process that is building it; else return without it.

    Returns:
        Whether this process built it.

    Raises:
        UserError: the cache cannot be written.
    """
    asked, pause = time.monotonic(), 0.05
    while find_damage(folder, thorough=thorough) is not None:
        with _try_lock(folder) as mine:
            if mine or time.monotonic() - asked > PATIENCE_SECONDS:
                return _build(folder, build, thorough)
        if not wait:
            return False
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)
    return False


def ensure_indices(
    indices: Sequence[CachedIndex],
    *,
    thorough: bool = False,
    done: Callable[[], None] = no_heartbeat,
) -> None:
    """Make all of these; processes that call this together share the work.

    Args:
        indices: what is needed.
        thorough: as in :func:`ensure_index`.
        done: called after each index that is there.
    """
    rest = []
    for index in indices:
        ensure_index(index.folder, index.build, thorough=thorough, wait=False)
        if find_damage(index.folder) is None:
            done()
        else:
            rest.append(index)  # another process is at it: look for one that is free first
    for index in rest:
        ensure_index(index.folder, index.build, thorough=thorough)
        done()


def find_damage(folder: Path, *, thorough: bool = False) -> str | None:
    """What is wrong with a cache folder: None when it is whole, "" when it is not there."""
    try:
        listed = json.loads((folder / CONTENTS).read_text())["files"]
    except FileNotFoundError:
        return f"{CONTENTS} is missing" if folder.is_dir() else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{CONTENTS} cannot be read: {error}"
    for name, (size, crc) in listed.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != size:
            return f"{name} has {found:,} bytes, expected {size:,}"
        if name.endswith(ARRAY) and (wrong := _array_fault(folder / name)) is not None:
            return f"{name} {wrong}"
        if thorough and file_crc32(folder / name) != crc:
            return f"{name} has another checksum than when it was written"
    return None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files into, renamed to ``folder`` when the block ends well.

    Its files are listed with sizes and checksums and brought to disk first. Where ``folder`` is
    there by then, it stays, and the new one is thrown away.
    """
    temporary = _unique(folder, "tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _seal(temporary)
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard_damaged(folder: Path, inode: int, problem: str) -> None:
    """Remove a cache folder that passed for whole but is not, unless it was replaced meanwhile."""
    try:
        if folder.stat().st_ino == inode:
            _warn(folder, problem)
            _remove(folder)
    except FileNotFoundError:
        return  # another process did it


def size_on_disk(folder: Path) -> int:
    """Bytes of the files of a cache folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _build(folder: Path, build: Callable[[Path], None], thorough: bool) -> bool:
    problem = find_damage(folder, thorough=thorough)
    if problem is None:  # finished between the look and the lock
        return False
    try:
        _remove_abandoned(folder)
        if problem:
            _warn(folder, problem)
            _remove(folder)
        with atomic_folder(folder) as temporary:
            build(temporary)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UserError(
            f"{folder.parent}: sample indices cannot be written there ({error.strerror}): make it "
            "writable, or give another folder with --data-cache-path"
        ) from error
    return True


def _warn(folder: Path, problem: str) -> None:
    print(f"warning: {folder}: {problem}; building it again", file=sys.stderr, flush=True)


@contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Whether this process may build; the kernel frees the lock of a killed one."""
    path = folder.with_name(f"{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(path, patient=False)
    except BlockingIOError:
        yield False
        return
    except OSError:
        yield True  # building reports what is wrong with the place
        return
    try:
        yield True
    finally:
        lock.release(remove=True)


def _seal(folder: Path) -> None:
    """Bring the files to disk, with a list of them."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = (path.stat().st_size, file_crc32(path))
        fsync_path(path)
    with (folder / CONTENTS).open("w") as stream:
        json.dump({"files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_path(folder)


def _array_fault(path: Path) -> str | None:
    """What is wrong with an array file, by its header; None if it holds integers, all of them.

    megatron-core has numpy load pickles: an array of objects, or a file that is no array, must not
    come so far.
    """
    try:
        with path.open("rb") as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
            expected = stream.tell() + math.prod(shape) * dtype.itemsize
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError) as error:
        return f"is no array ({' '.join(str(error).split())[:80]})"
    if dtype.kind not in "iu":
        return f"holds {dtype} instead of integers"
    if path.stat().st_size != expected:
        return f"has {path.stat().st_size:,} bytes, its header says {expected:,}"
    return None


def _unique(folder: Path, kind: str) -> Path:
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    return folder.with_name(f"{folder.name}.{kind}-{owner}")


def _remove(folder: Path) -> None:
    """Take a folder away from its name at once, then delete it."""
    away = _unique(folder, "old")
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed processes left behind while they built this index."""
    here = socket.gethostname()
    for kind in ("tmp", "old"):
        for path in folder.parent.glob(f"{folder.name}.{kind}-*"):
            host, pid, _ = path.name.rpartition(f".{kind}-")[2].rsplit("-", 2)
            try:
                old = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            except FileNotFoundError:
                continue
            if old or (host == here and not process_exists(int(pid))):
                shutil.rmtree(path, ignore_errors=True)
