"""The input files in a folder, and the files in it that are not read, with the reasons."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = ("", ".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4")
SUFFIXES = (*(t + c for t in JSON_SUFFIXES for c in COMPRESSED_SUFFIXES), ".parquet")
PLAIN_TEXT_SUFFIXES = tuple(f".txt{c}" for c in COMPRESSED_SUFFIXES)
NAMES_SHOWN = 3
NAMES_KEPT = 100
MANIFEST = b'"megatron_llmjp dataset manifest'


@dataclass(frozen=True)
class Ignored:
    """A file or folder below an input folder that is not read."""

    name: str
    reason: str
    other: str = ""
    """The path that the reason is about, such as the one that the file is reached by already."""

    @property
    def kind(self) -> str:
        """The reason without the path that it is about."""
        return f"{self.reason} another" if self.other else self.reason

    @property
    def text(self) -> str:
        """The whole reason."""
        return f"{self.reason} {self.other}" if self.other else self.reason


def has_suffix(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Return whether a file name ends in one of these suffixes, in any case."""
    return name.lower().endswith(tuple(suffixes))


def walk(folder: str, suffixes: Sequence[str]) -> tuple[list[str], list[Ignored]]:
    """Return the input files below a folder, sorted by path, and everything else that is there.

    Symbolic links are followed. A folder or file that is reached twice is taken once.

    Raises:
        UserError: a folder cannot be read.
    """
    files: list[str] = []
    ignored: list[Ignored] = []
    seen: dict[str, str] = {}
    for name, skipped in sorted(_walk(Path(folder), suffixes, {}), key=lambda found: found[0]):
        first = name if skipped else seen.setdefault(os.path.realpath(name), name)
        if skipped is None and first != name:
            skipped = Ignored(name, "the same file as", first)
        if skipped is None:
            files.append(name)
        else:
            ignored.append(skipped)
    return files, ignored


def _walk(
    folder: Path, suffixes: Sequence[str], above: dict[str, Path]
) -> Iterator[tuple[str, Ignored | None]]:
    """Yield each path, and why it is ignored if it is."""
    real = os.path.realpath(folder)
    if real in above:
        yield str(folder), Ignored(str(folder), "a link back to", str(above[real]))
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"--input: {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        reason = _reason_of_folder(entry) if entry.is_dir() else _reason(entry, suffixes)
        if reason is not None:
            yield str(entry), Ignored(str(entry), reason)
        elif entry.is_dir():
            yield from _walk(entry, suffixes, above | {real: folder})
        else:
            yield str(entry), None


def _reason_of_folder(folder: Path) -> str | None:
    if folder.name.startswith("."):
        return "a hidden folder"
    return "unfinished output" if folder.name.endswith(".partial") else None


def _reason(file: Path, suffixes: Sequence[str]) -> str | None:
    """Return why a file is not read, or None if it is."""
    if file.name.startswith("."):
        return "hidden"
    if not file.exists():
        return "a broken link"
    if not file.is_file():
        return "not a regular file"
    if not has_suffix(file.name, suffixes):
        return "no known suffix"
    if file.name.endswith("_rejected.jsonl"):
        return "lines rejected by preprocess_data"
    return "a dataset's manifest" if _is_manifest(file) else None


def _is_manifest(file: Path) -> bool:
    if file.suffix != ".json" or not file.with_suffix(".idx").exists():
        return False
    with file.open("rb") as stream:
        return MANIFEST in stream.read(200)


def describe(ignored: Sequence[Ignored]) -> str:
    """Return one line on the files that are not read, by reason; empty if there are none."""
    if not ignored:
        return ""
    by_reason = {
        reason: [Path(entry.name).name for entry in ignored if entry.kind == reason]
        for reason, _ in Counter(entry.kind for entry in ignored).most_common()
    }
    parts = []
    for reason, names in by_reason.items():
        more = ", ..." if len(names) > NAMES_SHOWN else ""
        parts.append(f"{len(names):,} {reason} ({', '.join(names[:NAMES_SHOWN])}{more})")
    return f"ignored: {len(ignored):,} files: {'; '.join(parts)}"


def record(ignored: Sequence[Ignored]) -> dict[str, Any]:
    """Return what a manifest keeps of the files that are not read: counts, and the first names."""
    return {
        "files": len(ignored),
        "reasons": dict(sorted(Counter(entry.kind for entry in ignored).items())),
        "first": {entry.name: entry.text for entry in ignored[:NAMES_KEPT]},
    }
