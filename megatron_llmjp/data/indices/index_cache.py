"""Cache of sample indices on disk: one folder per index, built once; does not import torch.

Many processes on many machines may need the same index at once, on a shared file system.
Correctness and efficiency use separate mechanisms:

Correctness relies on renaming. Each builder writes into its own temporary folder and renames it to
the final name after its files are on disk. Renaming a folder is atomic, and fails if a non-empty
folder already has the name, on NFS and Lustre as well; the later builder then discards its own
copy. No reader ever sees an incomplete index, whichever process is killed at whatever time.

A lock (``filesystem.py``) only avoids duplicate work: builders of the same index acquire it first,
so that one builds and the others wait. Where a file system has no locks (some Lustre mounts), has
node-local locks, or keeps the lock of a machine that disappeared (NFS 3), some work is done twice.
A lock file created with O_EXCL and a heartbeat would not work better: it outlives its owner, and
the heartbeat stops while numpy or megatron-core's helpers hold the interpreter lock, about a minute
for a large index.
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
from tokenize import TokenError
from typing import Protocol, TypeVar

from numpy.lib import format as npy

from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import (
    acquire_lock,
    file_crc32,
    fsync_path,
    no_heartbeat,
    process_exists,
)

T = TypeVar("T")

CONTENTS_FILE = "contents.json"
ARRAY = ".npy"
LOCK_TIMEOUT_SECONDS = 600.0
"""Time to wait for another process that holds the lock before building anyway."""
ABANDONED_SECONDS = 24 * 3600.0
"""Age at which an unfinished folder of another machine is considered abandoned."""
_UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR,
}  # fmt: skip


class CachedIndex(Protocol):
    """An index that can be built into a cache folder, here or (pickled) in another process."""

    @property
    def folder(self) -> Path:
        """Folder of the complete index, named after everything that determines its contents."""

    @property
    def build_cost(self) -> int:
        """Estimated build time, in shuffled entries of less than 0.2 us each."""

    def build(self, temporary: Path) -> None:
        """Write the index files into an existing, empty folder."""


def ensure_index(
    folder: Path, build: Callable[[Path], None], *, thorough: bool = False, wait: bool = True
) -> bool:
    """Build an index in ``folder`` unless it exists or another process builds it.

    A damaged index is replaced, with a warning.

    Args:
        folder: final location of the index.
        build: writes the files into an existing, empty folder.
        thorough: compare checksums too, not only sizes; reads the whole index.
        wait: wait for another process that is building the index, instead of returning.

    Returns:
        Whether this process built the index.

    Raises:
        UserError: the cache is not writable.
    """
    asked, pause = time.monotonic(), 0.05
    while find_damage(folder, thorough=thorough) is not None:
        with _try_lock(folder) as mine:
            if mine or time.monotonic() - asked > LOCK_TIMEOUT_SECONDS:
                return _build_missing(folder, build, thorough)
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
    """Build all missing indices; processes that call this concurrently share the work.

    Args:
        indices: the required indices.
        thorough: as in :func:`ensure_index`.
        done: called after each index that exists or was built.
    """
    rest = []
    for index in indices:
        ensure_index(index.folder, index.build, thorough=thorough, wait=False)
        if find_damage(index.folder) is None:
            done()
        else:
            rest.append(index)  # another process is building it: try the others first
    for index in rest:
        ensure_index(index.folder, index.build, thorough=thorough)
        done()


def open_index(index: CachedIndex, load: Callable[[], T], damage: tuple[type[Exception], ...]) -> T:
    """Return ``load()`` of an index, which is built first if it is missing.

    If ``load`` raises one of the ``damage`` errors, the index is rebuilt and loaded again.
    """
    ensure_index(index.folder, index.build)
    inode = index.folder.stat().st_ino
    try:
        return load()
    except damage as error:
        discard_damaged(index.folder, inode, str(error))
        ensure_index(index.folder, index.build)
        return load()


def find_damage(folder: Path, *, thorough: bool = False) -> str | None:
    """Describe the damage of a cache folder: None if it is intact, "" if it does not exist."""
    try:
        listed = _read_contents(folder)
    except (FileNotFoundError, NotADirectoryError):
        return f"{CONTENTS_FILE} is missing" if folder.exists() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{CONTENTS_FILE} cannot be read: {error!r}"
    for name, (size, crc) in listed.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != size:
            return f"{name} has {found:,} bytes, expected {size:,}"
        if name.endswith(ARRAY) and (wrong := _find_array_damage(folder / name)) is not None:
            return f"{name} {wrong}"
        if thorough and file_crc32(folder / name) != crc:
            return f"{name} has another checksum than when it was written"
    return None


def _read_contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and CRC-32 of each file of a cache folder, from its list of contents.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: it is damaged.
    """
    listed = json.loads((folder / CONTENTS_FILE).read_text())["files"]
    found = {}
    for name, (size, crc) in listed.items():
        if type(size) is not int or type(crc) is not int or Path(name).name != name or "\0" in name:
            raise ValueError(f"an invalid entry of {name!r}")
        found[name] = (size, crc)
    return found


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Provide a temporary folder that is renamed to ``folder`` when the block succeeds.

    Before that its files are flushed to disk and listed with sizes and checksums. If ``folder``
    exists by then, it is kept and the new one is discarded.
    """
    temporary = _unique_sibling(folder, "tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _write_contents_file(temporary)
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard_damaged(folder: Path, inode: int, problem: str) -> None:
    """Remove a damaged cache folder that :func:`find_damage` missed, unless it was replaced."""
    try:
        if folder.stat().st_ino == inode:
            _warn_of_rebuild(folder, problem)
            _remove(folder)
    except FileNotFoundError:
        return  # removed by another process


def size_on_disk(folder: Path) -> int:
    """Return the total size in bytes of the files of a cache folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _build_missing(folder: Path, build: Callable[[Path], None], thorough: bool) -> bool:
    problem = find_damage(folder, thorough=thorough)
    if problem is None:  # completed before this process got the lock
        return False
    try:
        _remove_abandoned(folder)
        if problem:
            _warn_of_rebuild(folder, problem)
            _remove(folder)
        with atomic_folder(folder) as temporary:
            build(temporary)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UserError(
            f"{folder.parent}: cannot write sample indices ({error.strerror}): make the folder "
            "writable, or choose another one with --data-cache-path"
        ) from error
    return True


def _warn_of_rebuild(folder: Path, problem: str) -> None:
    print(f"warning: {folder}: {problem}; rebuilding this index", file=sys.stderr, flush=True)


@contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Yield whether this process may build; the kernel releases the lock of a killed process."""
    path = folder.with_name(f"{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(path, retry=False)
    except BlockingIOError:
        yield False
        return
    except OSError:
        yield True  # building will report the error of the folder
        return
    try:
        yield True
    finally:
        lock.release(remove=True)


def _write_contents_file(folder: Path) -> None:
    """Flush the files to disk and write a list of them."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = (path.stat().st_size, file_crc32(path))
        fsync_path(path)
    with (folder / CONTENTS_FILE).open("w") as stream:
        json.dump({"files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_path(folder)


def _find_array_damage(path: Path) -> str | None:
    """Check the header of an array file; return the problem, or None for a complete integer array.

    megatron-core lets numpy load pickles, so an array of objects, or a file that is not an array,
    must be rejected before megatron-core opens it.
    """
    try:
        with path.open("rb") as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
            expected = stream.tell() + math.prod(shape) * dtype.itemsize
    except (OSError, ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
        return f"is not an array ({' '.join(str(error).split())[:80]})"
    if dtype.kind not in "iu":
        return f"holds {dtype} instead of integers"
    if path.stat().st_size != expected:
        return f"has {path.stat().st_size:,} bytes, but its header requires {expected:,}"
    return None


def _unique_sibling(folder: Path, kind: str) -> Path:
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    return folder.with_name(f"{folder.name}.{kind}-{owner}")


def _remove(folder: Path) -> None:
    """Rename a folder, which is atomic, and then delete it."""
    away = _unique_sibling(folder, "old")
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete temporary folders that killed builders of this index left behind."""
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
