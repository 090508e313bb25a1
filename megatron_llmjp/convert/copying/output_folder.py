"""Atomic output folders of conversions.

The output is written to a hidden folder next to the output folder, synced to disk and renamed. A
killed conversion leaves at most the hidden folder, which the next conversion removes first.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import FileLock, acquire_lock, fsync_path


@contextmanager
def atomic_output_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Yield a folder that is renamed to ``target`` on success and removed on an exception.

    Args:
        target: the output folder, which must not exist.
        nbytes: size of the output, compared with the free disk space first.

    Raises:
        UserError: the target exists, cannot be written, is being written by another process, or
            is larger than the free disk space.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another --output or remove it")
    partial = target.with_name(f".{target.name}.partial")
    lock = _lock_output(target)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        check_free_space(partial, nbytes)
        yield partial
        sync_folder(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        fsync_path(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written: {error.strerror or error}; the incomplete output was "
            "removed"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release(remove=True)


def _lock_output(target: Path) -> FileLock:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return acquire_lock(target.with_name(f".{target.name}.lock"))
    except BlockingIOError:
        raise UserError(f"{target}: is being written by another conversion") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be created: {error.strerror}") from error


def check_free_space(folder: Path, nbytes: int) -> None:
    """Compare the size of the files to write with the free space on the disk of a folder.

    Raises:
        UserError: the free space does not suffice.
    """
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(
            f"{folder.parent}: {nbytes / 1e9:.1f} GB required, {free / 1e9:.1f} GB free"
        )


def sync_folder(folder: Path) -> None:
    """Flush all files and folders below a folder to disk.

    Raises:
        OSError: one cannot be flushed.
    """
    with ThreadPoolExecutor(4, "sync") as pool:
        list(pool.map(fsync_path, [*sorted(folder.rglob("*")), folder]))
