"""``manifest.json`` of a checkpoint, the tracker file, and completeness checks.

A checkpoint is a folder ``iter_0001000`` with megatron-core's torch_dist files, the resolved
configuration (``config.yaml``), the fold file (``folds.yaml``), the tokenizer's files
(``tokenizer/``) and the manifest, which lists all files with sizes and checksums. The folder is
written under a temporary name and renamed when complete. ``latest_checkpointed_iteration.txt`` in
the save folder contains the newest iteration, as in Megatron-LM.
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

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FOLDS = "folds.yaml"
TOKENIZER = "tokenizer"
GENERATION = f"{TOKENIZER}/hf_generation.json"
"""Generation settings of a model converted from Hugging Face, from ``convert_checkpoint``. The name
is ``GENERATION_FILE`` of ``tokenizers/registry.py``, which imports NumPy; run_status must not."""
CHAT_TEMPLATE = f"{TOKENIZER}/chat_template.jinja"
"""Chat template of an instruction-tuned model."""
TRACKER = "latest_checkpointed_iteration.txt"
TENSOR_SUFFIX = ".distcp"
"""Suffix of the tensor files. All other files are small."""


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    crc32: str
    """Eight hexadecimal digits. CRC-32 detects accidental damage at the speed of a fast disk."""


def _accept_plain_digest(value: Any) -> Any:
    """Accept a plain digest, as in checkpoints written before fold fingerprints were stored."""
    return {"digest": value} if isinstance(value, str) else value


def _drop_non_finite(value: Any) -> Any:
    """Drop values that are not finite numbers, such as the mean of no losses."""
    if not isinstance(value, dict):
        return value
    numbers = (int, float)
    return {k: v for k, v in value.items() if isinstance(v, numbers) and math.isfinite(v)}


class AcceptedOverride(BaseModel):
    """A difference from the run history that ``--override-resume`` accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iteration: int
    """Iteration of the checkpoint that was resumed."""
    difference: str


class Manifest(BaseModel):
    """The contents of ``manifest.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["megatron_llmjp"] = "megatron_llmjp"
    format_version: Literal[1] = 1
    iteration: int
    consumed_samples: int
    contents: Literal["full", "weights"]
    """``weights`` for a converted model, which can only be loaded with ``--finetune``."""
    folds: dict[str, Annotated[FoldFingerprint, BeforeValidator(_accept_plain_digest)]] = {}
    """The consumed folds by name, in training order."""
    skips: list[tuple[int, int]] = []
    """Skipped positions of the schedule, as half-open ranges."""
    skipped_iterations: dict[str, tuple[int, int]] = {}
    """Skipped positions by the range that was given to ``--skip-iterations``."""
    overrides: list[AcceptedOverride] = []
    """Accepted differences from the run history, oldest first."""
    metrics: Annotated[dict[str, float], BeforeValidator(_drop_non_finite)] = {}
    """Latest logged values, such as ``lm loss``; finite, as JSON has no NaN."""
    persistent: bool = True
    """False for a checkpoint that is removed when a newer one is complete; written only then, so
    that earlier versions of this program read the others."""
    data_parallel_size: int | None = None
    """Data-parallel size of the run that saved; it determines which rank consumed which sample."""
    versions: dict[str, str] = {}
    files: dict[str, FileEntry]
    checksum: str | None = None
    """SHA-256 of all other fields; None in manifests of earlier versions."""


def folder_name(iteration: int) -> str:
    """Return the folder name of an iteration's checkpoint, as in Megatron-LM."""
    return f"iter_{iteration:07d}"


def file_entry(path: Path) -> FileEntry:
    """Return size and CRC-32 of a file."""
    return FileEntry(bytes=path.stat().st_size, crc32=f"{file_crc32(path):08x}")


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Return size and CRC-32 of the named files, relative to ``folder``."""
    return {name: file_entry(folder / name) for name in sorted(names)}


def all_files(folder: Path) -> list[str]:
    """List all files below ``folder`` except the manifest, as relative POSIX paths."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in (p.relative_to(folder).as_posix() for p in paths) if n != MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, the last file of a checkpoint, and sync it to disk."""
    excluded = {"checksum", "persistent"} if manifest.persistent else {"checksum"}
    content = json.loads(manifest.model_dump_json(exclude=excluded))
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: it is missing, damaged or edited, its iteration differs from the folder's name,
            or it names files outside the folder.
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
        raise UserError(f"{path}: checksum mismatch: the file was edited or damaged")
    name = folder.absolute().name
    if re.fullmatch(r"iter_\d+", name) and name != folder_name(manifest.iteration):
        raise UserError(
            f"{folder}: contains the checkpoint of iteration {manifest.iteration}; rename the "
            f"folder to {folder_name(manifest.iteration)}"
        )
    outside = [n for n in manifest.files if n.startswith("/") or ".." in Path(n).parts]
    if outside:
        raise UserError(f"{path}: names a file outside its folder: {outside[0]}")
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's fields, independent of the JSON formatting."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_problems(folder: Path, manifest: Manifest, checksums: bool = False) -> list[str]:
    """Compare the files of a checkpoint with its manifest and return the differences.

    Compares the sizes of all files and the checksums of all files but tensor files; with
    ``checksums``, also those of tensor files. Stops at the first file that cannot be read.
    """
    found: list[str] = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            with_checksum = checksums or not name.endswith(TENSOR_SUFFIX)
            problem = retry_transient(partial(_file_problem, path, entry, with_checksum), str(path))
        except OSError as error:
            return [*found, f"{path} cannot be read: {error.strerror}"]
        found += [problem] if problem else []
    return found


def _file_problem(path: Path, entry: FileEntry, checksum: bool) -> str | None:
    """Return how one file differs from its entry, or None."""
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
    """List the iterations of the checkpoints in ``root`` that have a manifest, ascending.

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
    """Return the iteration in the tracker file, or None, and problems of the file."""
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
    return None, [
        f"{path} contains {text!r} instead of an iteration" if text else f"{path} is empty"
    ]


def newest_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else its newest complete checkpoint.

    Raises:
        UserError: no complete checkpoint exists there.
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
