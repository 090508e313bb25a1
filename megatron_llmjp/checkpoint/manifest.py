"""``manifest.json``: what a checkpoint folder holds, so that anyone can tell whether it is whole.

A checkpoint is a folder ``iter_0001000`` with megatron-core's torch_dist files, the resolved
configuration (``config.yaml``), the fold file (``folds.yaml``), the tokenizer's files
(``tokenizer/``) and this manifest. It is written under a temporary name and renamed when complete;
``latest_checkpointed_iteration.txt`` beside it names the newest one, as in Megatron-LM.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from megatron_llmjp.data.folds.fingerprint import FoldFingerprint
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import file_crc32, retry_transient, write_atomically
from megatron_llmjp.tokenizers import registry

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FOLDS = "folds.yaml"
TOKENIZER = "tokenizer"
GENERATION = f"{TOKENIZER}/{registry.GENERATION}"
"""How a model that came from Hugging Face generates text; ``convert_checkpoint`` writes it."""
TRACKER = "latest_checkpointed_iteration.txt"
TENSOR_SUFFIX = ".distcp"
"""Ending of the files that hold the tensors. All others are small."""


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    crc32: str
    """Eight hexadecimal digits. It finds any accidental damage and keeps pace with a fast disk."""


def _digest_alone(value: Any) -> Any:
    """Checkpoints of before records were stored hold a fold's digest in its place."""
    return {"digest": value} if isinstance(value, str) else value


def _finite_alone(value: Any) -> Any:
    """Without what is no number, such as the mean of no losses: it is of no use to a resume."""
    if not isinstance(value, dict):
        return value
    numbers = (int, float)
    return {k: v for k, v in value.items() if isinstance(v, numbers) and math.isfinite(v)}


class AcceptedOverride(BaseModel):
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
    folds: dict[str, Annotated[FoldFingerprint, BeforeValidator(_digest_alone)]] = {}
    """Every fold touched so far, by name, in the order they were trained."""
    skips: list[tuple[int, int]] = []
    """Positions of the schedule that are left out, as half-open ranges."""
    skipped_iterations: dict[str, tuple[int, int]] = {}
    """Those that ``--skip-iterations`` asked for, by its words."""
    overrides: list[AcceptedOverride] = []
    """Changes of the past that were accepted, oldest first."""
    metrics: Annotated[dict[str, float], BeforeValidator(_finite_alone)] = {}
    """The last values of the log, such as ``lm loss``; JSON has no NaN."""
    data_parallel_size: int | None = None
    """Of the run that saved; it decides which rank trained on which sample."""
    versions: dict[str, str] = {}
    files: dict[str, FileEntry]
    checksum: str | None = None
    """SHA-256 of everything else in the file; None in manifests of before it was stored."""


def folder_name(iteration: int) -> str:
    """The folder of an iteration's checkpoint, as Megatron-LM names it."""
    return f"iter_{iteration:07d}"


def file_entry(path: Path) -> FileEntry:
    """Size in bytes and CRC-32 of a file."""
    return FileEntry(bytes=path.stat().st_size, crc32=f"{file_crc32(path):08x}")


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Entries for the named files, relative to ``folder``."""
    return {name: file_entry(folder / name) for name in sorted(names)}


def all_files(folder: Path) -> list[str]:
    """Every file below ``folder`` but the manifest, as relative POSIX paths."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in (p.relative_to(folder).as_posix() for p in paths) if n != MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, the last file of a checkpoint, and force it to disk."""
    content = json.loads(manifest.model_dump_json(exclude={"checksum"}))
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: it is missing, damaged or edited, belongs to another iteration than the folder's
            name says, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = retry_transient(path.read_bytes, str(path)).decode()
        manifest = Manifest.model_validate_json(text)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a complete checkpoint, {MANIFEST} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None
    if manifest.checksum is not None and manifest.checksum != _checksum(json.loads(text)):
        raise UserError(f"{path}: its content does not have its checksum: it was edited or damaged")
    name = folder.absolute().name
    if re.fullmatch(r"iter_\d+", name) and name != folder_name(manifest.iteration):
        raise UserError(
            f"{folder}: holds the checkpoint of iteration {manifest.iteration}; rename the folder "
            f"to {folder_name(manifest.iteration)}"
        )
    outside = [n for n in manifest.files if n.startswith("/") or ".." in Path(n).parts]
    if outside:
        raise UserError(f"{path}: names a file outside its folder: {outside[0]}")
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, however its JSON is formatted."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_problems(folder: Path, manifest: Manifest, checksums: bool = False) -> list[str]:
    """What is wrong with the files of a checkpoint; empty when it is whole.

    Sizes are always compared, and checksums of all files but those of the tensors: a resume reads
    them anyway. ``checksums`` reads the tensors, too. A file that cannot be read ends the search.
    """
    found: list[str] = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            thorough = checksums or not name.endswith(TENSOR_SUFFIX)
            problem = retry_transient(partial(_problem, path, entry, thorough), str(path))
        except OSError as error:
            return [*found, f"{path} cannot be read: {error.strerror}"]
        found += [problem] if problem else []
    return found


def _problem(path: Path, entry: FileEntry, checksum: bool) -> str | None:
    """What is wrong with one file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a file"
    if status.st_size != entry.bytes:
        return f"{path} has {status.st_size} bytes instead of {entry.bytes}"
    if checksum and file_entry(path).crc32 != entry.crc32:
        return f"{path} does not have the checksum of its manifest"
    return None


def complete_iterations(root: Path) -> list[int]:
    """Iterations of the checkpoints under ``root`` that carry a manifest, ascending.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return retry_transient(lambda: _complete_iterations(root), str(root))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{root}: cannot be read: {error.strerror}") from None


def _complete_iterations(root: Path) -> list[int]:
    names = (re.fullmatch(r"iter_(\d{7,})", p.name) for p in root.iterdir())
    return sorted(int(m[1]) for m in names if m and (root / m[0] / MANIFEST).is_file())


def read_tracker(root: Path) -> tuple[int | None, list[str]]:
    """The iteration that the tracker file names, or None; and what is wrong with the file."""
    path = root / TRACKER
    try:
        content = retry_transient(path.read_bytes, str(path))
        text = content[:100].decode(errors="replace").strip()
    except FileNotFoundError:
        return None, []
    except OSError as error:
        return None, [f"{path} cannot be read: {error.strerror}"]
    if re.fullmatch(r"\d{1,18}", text):
        return int(text), []
    return None, [f"{path} holds {text!r} instead of an iteration" if text else f"{path} is empty"]


def newest_checkpoint(path: Path) -> Path:
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


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
