"""``manifest.json``: what a checkpoint folder holds, so that anyone can tell whether it is whole.

A checkpoint is a folder ``iter_0001000`` with megatron-core's torch_dist files, the resolved
configuration (``config.yaml``), the fold file (``folds.yaml``), the tokenizer's files
(``tokenizer/``) and this manifest. It is written under a temporary name and renamed when complete;
``latest_checkpointed_iteration.txt`` beside it names the newest one, as in Megatron-LM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from megatron_llmjp.data.fold_record import FoldRecord
from megatron_llmjp.errors import UserError
from megatron_llmjp.system import crc32_of, sync

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FOLDS = "folds.yaml"
TOKENIZER = "tokenizer"
TRACKER = "latest_checkpointed_iteration.txt"


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    crc32: str
    """Eight hexadecimal digits. It finds any accidental damage and keeps pace with a fast disk."""


def _digest_alone(value: Any) -> Any:
    """Checkpoints of before records were stored hold a fold's digest in its place."""
    return {"digest": value} if isinstance(value, str) else value


class Override(BaseModel):
    """A change of the past that ``--override-resume`` accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iteration: int
    """Iteration of the checkpoint that was gone on from."""
    difference: str


class Manifest(BaseModel):
    """The contents of ``manifest.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["megatron_llmjp"] = "megatron_llmjp"
    format_version: Literal[1] = 1
    iteration: int
    consumed_samples: int
    contents: Literal["full", "weights"]
    """``weights`` for a converted model: it can be loaded with ``--finetune`` only."""
    folds: dict[str, Annotated[FoldRecord, BeforeValidator(_digest_alone)]] = {}
    """Every fold touched so far, by name, in the order they were trained."""
    skips: list[tuple[int, int]] = []
    """Positions of the schedule that are left out, as half-open ranges."""
    skipped_iterations: dict[str, tuple[int, int]] = {}
    """Those that ``--skip-iterations`` asked for, by its words."""
    overrides: list[Override] = []
    """Changes of the past that were accepted, oldest first."""
    metrics: dict[str, float] = {}
    """The last values of the log, such as ``lm loss``."""
    data_parallel_size: int | None = None
    """Of the run that saved; it decides which rank trained on which sample."""
    versions: dict[str, str] = {}
    files: dict[str, FileEntry]


def folder_name(iteration: int) -> str:
    """The folder of an iteration's checkpoint, as Megatron-LM names it."""
    return f"iter_{iteration:07d}"


def describe_file(path: Path) -> FileEntry:
    """Size in bytes and CRC-32 of a file."""
    return FileEntry(bytes=path.stat().st_size, crc32=f"{crc32_of(path):08x}")


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Entries for the named files, relative to ``folder``."""
    return {name: describe_file(folder / name) for name in sorted(names)}


def all_files(folder: Path) -> list[str]:
    """Every file below ``folder`` but the manifest, as relative POSIX paths."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in (p.relative_to(folder).as_posix() for p in paths) if n != MANIFEST)


def write(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, the last file of a checkpoint, and force it to disk."""
    write_durably(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: it is missing, damaged, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a complete checkpoint, {MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None
    outside = [n for n in manifest.files if n.startswith("/") or ".." in Path(n).parts]
    if outside:
        raise UserError(f"{path}: names a file outside its folder: {outside[0]}")
    return manifest


def problems(folder: Path, manifest: Manifest, checksums: bool = False) -> list[str]:
    """What is wrong with the files of a checkpoint; empty when it is whole.

    Sizes are always compared; ``checksums`` reads every byte.
    """
    found = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif (size := path.stat().st_size) != entry.bytes:
            found.append(f"{path} has {size} bytes instead of {entry.bytes}")
        elif checksums and describe_file(path).crc32 != entry.crc32:
            found.append(f"{path} does not have the checksum of its manifest")
    return found


def complete_iterations(root: Path) -> list[int]:
    """Iterations of the checkpoints under ``root`` that carry a manifest, ascending."""
    if not root.is_dir():
        return []
    names = (re.fullmatch(r"iter_(\d{7,})", p.name) for p in root.iterdir())
    return sorted(int(m[1]) for m in names if m and (root / m[0] / MANIFEST).is_file())


def read_tracker(root: Path) -> tuple[int | None, list[str]]:
    """The iteration that the tracker file names, or None; and what is wrong with the file."""
    path = root / TRACKER
    try:
        text = path.read_bytes()[:100].decode(errors="replace").strip()
    except FileNotFoundError:
        return None, []
    except OSError as error:
        return None, [f"{path} cannot be read: {error.strerror}"]
    if re.fullmatch(r"\d{1,18}", text):
        return int(text), []
    return None, [f"{path} holds {text!r} instead of an iteration" if text else f"{path} is empty"]


def newest(path: Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or its newest complete one.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    iterations = complete_iterations(path)
    if not iterations:
        raise UserError(f"{path}: no complete checkpoint (iter_*/{MANIFEST}) was found")
    return path / folder_name(iterations[-1])


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync(path.parent)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
