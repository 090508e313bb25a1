"""How a checkpoint folder gets and loses its name, so that a crash at any moment leaves whole ones.

Whatever is not whole has a name that begins with a dot and ends in ``.tmp``; only the run that
holds the save folder removes such leftovers, before its next save. Without torch.
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
    """Where the checkpoint of an iteration is while it is being written."""
    return root / f".{manifests.folder_name(iteration)}.tmp"


def create_temporary_folder(
    root: Path, iteration: int, beat: Callable[[], None] = no_heartbeat
) -> None:
    """Remove what interrupted saves and removals left behind, and make a folder to write into.

    ``beat`` is called after each file that was removed.

    Raises:
        OSError: the disk does not let it.
    """
    for leftover in root.glob(".iter_*.tmp"):
        delete_folder(leftover, beat)
    for file in root.glob(f".{manifests.TRACKER}.*.tmp"):
        file.unlink(missing_ok=True)
    temporary_folder(root, iteration).mkdir(parents=True)


def delete_folder(folder: Path, beat: Callable[[], None] = no_heartbeat) -> None:
    """Delete a folder, with a heartbeat after each file; what cannot be deleted stays.

    A file of many gigabytes may take seconds, and a checkpoint has a thousand.
    """
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        beat()


def write_small_file(folder: Path, name: str, contents: bytes) -> FileEntry:
    """Write a small file, which may be in a folder of its own, and force it to disk."""
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
    """Give a written folder its manifest and its name, and make it the newest.

    Everything else in it must be on disk already. A checkpoint that has the name is replaced.

    Returns:
        The finished folder.

    Raises:
        OSError: the disk does not let it, or the manifest does not read back as it was.
    """
    temporary = temporary_folder(root, manifest.iteration)
    final = root / manifests.folder_name(manifest.iteration)
    _write_manifest(temporary, manifest)
    if final.exists():
        replaced = root / f".{final.name}.replaced.tmp"
        final.replace(replaced)
        temporary.replace(final)
        shutil.rmtree(replaced, ignore_errors=True)  # else the next save's to remove
    else:
        temporary.replace(final)
    fsync_path(root)
    write_atomically(root / manifests.TRACKER, f"{manifest.iteration}\n")
    return final


def _write_manifest(folder: Path, manifest: manifests.Manifest) -> None:
    """Write the manifest, and parse what was written: a folder that cannot be read gets no name."""
    manifests.write_manifest(folder, manifest)
    path = folder / manifests.MANIFEST
    try:
        found = manifests.read_manifest(folder).model_copy(update={"checksum": manifest.checksum})
    except UserError as error:
        raise OSError(errno.EIO, f"reads back as damaged ({error})", str(path)) from None
    if found != manifest:
        raise OSError(errno.EIO, "does not read back as it was written", str(path))


def unpublish_checkpoint(root: Path, iteration: int) -> Path:
    """Take its name from a checkpoint that is no longer wanted; it is not a whole one from now on.

    Returns:
        Where it is until it is deleted.

    Raises:
        OSError: the disk does not let it.
    """
    folder = root / manifests.folder_name(iteration)
    retired = root / f".{folder.name}.removed.tmp"
    folder.replace(retired)
    fsync_path(root)
    return retired
