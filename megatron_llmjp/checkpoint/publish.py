"""Atomic creation, replacement and removal of checkpoint folders by renaming. Without torch.

Incomplete folders have names that begin with a dot and end in ``.tmp``, so that a crash at any
moment leaves complete checkpoints only. The run that holds the lock of the save folder removes such
leftovers before its next save.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.manifest import FileEntry
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import (
    fsync_path,
    name_path_in_errors,
    no_heartbeat,
    write_atomically,
)


def temporary_folder(root: Path, iteration: int) -> Path:
    """Return the folder in which the checkpoint of an iteration is written."""
    return root / f".{manifests.folder_name(iteration)}.tmp"


def create_temporary_folder(
    root: Path, iteration: int, beat: Callable[[], None] = no_heartbeat
) -> None:
    """Delete leftovers of interrupted saves and removals, and create a folder to write into.

    ``beat`` is called after each deleted file.

    Raises:
        OSError: a file cannot be deleted or the folder cannot be created.
    """
    for leftover in root.glob(".iter_*.tmp"):
        delete_folder(leftover, beat)
    for file in root.glob(f".{manifests.TRACKER}.*.tmp"):
        file.unlink(missing_ok=True)
    temporary_folder(root, iteration).mkdir(parents=True)


def delete_folder(folder: Path, beat: Callable[[], None] = no_heartbeat) -> None:
    """Delete a folder, with a heartbeat after each file; errors are ignored.

    Deleting a file of many gigabytes may take seconds, and a checkpoint may have a thousand files.
    """
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        beat()


def write_small_file(folder: Path, name: str, contents: bytes) -> FileEntry:
    """Write a small file, possibly in a subfolder, and sync it to disk."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with name_path_in_errors(path), path.open("wb") as stream:
        stream.write(contents)
        stream.flush()
        os.fsync(stream.fileno())
    if path.parent != folder:
        fsync_path(path.parent)
    return manifests.file_entry(path)


def publish_checkpoint(root: Path, manifest: manifests.Manifest) -> Path:
    """Write the manifest, rename the folder to its final name, and update the tracker.

    All other files must be synced to disk already. An existing checkpoint of the iteration is
    replaced.

    Returns:
        The final folder.

    Raises:
        OSError: writing or renaming failed, or the manifest on disk differs from what was written.
    """
    temporary = temporary_folder(root, manifest.iteration)
    final = root / manifests.folder_name(manifest.iteration)
    _write_manifest(temporary, manifest)
    if final.exists():
        replaced = root / f".{final.name}.replaced.tmp"
        final.replace(replaced)
        temporary.replace(final)
        shutil.rmtree(replaced, ignore_errors=True)  # leftovers: deleted by the next save
    else:
        temporary.replace(final)
    fsync_path(root)
    write_atomically(root / manifests.TRACKER, f"{manifest.iteration}\n")
    return final


def _write_manifest(folder: Path, manifest: manifests.Manifest) -> None:
    """Write the manifest and read it back, so that an unreadable checkpoint is not published."""
    manifests.write_manifest(folder, manifest)
    path = folder / manifests.MANIFEST
    try:
        found = manifests.read_manifest(folder).model_copy(update={"checksum": manifest.checksum})
    except UserError as error:
        raise OSError(errno.EIO, f"is damaged after writing ({error})", str(path)) from None
    if found != manifest:
        raise OSError(errno.EIO, "differs from what was written", str(path))


def unpublish_checkpoint(root: Path, iteration: int) -> Path:
    """Rename a checkpoint to a temporary name, so that it no longer counts as complete.

    Returns:
        The temporary folder, to be deleted.

    Raises:
        OSError: renaming failed.
    """
    folder = root / manifests.folder_name(iteration)
    unpublished = root / f".{folder.name}.removed.tmp"
    folder.replace(unpublished)
    fsync_path(root)
    return unpublished
