"""From ``--input`` words to the ordered list of files they mean."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.errors import UserError

STDIN = "-"
TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = ("", ".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (*(t + c for t in TEXT_SUFFIXES for c in COMPRESSED_SUFFIXES), ".parquet")


@dataclass(frozen=True)
class Source:
    """One input file, as it was when the program started.

    Attributes:
        name: the path as given, or ``-`` for standard input.
        size: bytes on disk; 0 where it cannot be known (standard input, a pipe).
        mtime: time of the last change, in nanoseconds; it tells whether a file has changed.
    """

    name: str
    size: int = 0
    mtime: int = 0
    seekable: bool = False

    def identity(self) -> dict[str, Any]:
        """Return what must not have changed when a stopped run goes on.

        The size is None for a pipe, which never is the same again.
        """
        size = self.size if self.seekable else None
        return {"name": self.name, "size": size, "mtime": self.mtime}


def find_sources(words: Iterable[str]) -> list[Source]:
    """Return the sources that files, folders, glob patterns and ``-`` stand for, in order.

    A folder stands for all files below it with a known suffix, a pattern for its matches, both
    sorted by name.

    Raises:
        UserError: something is missing, matches nothing or is named twice.
    """
    sources: list[Source] = []
    seen: dict[str, str] = {}
    for word in words:
        for name in _expand(word):
            real = name if name == STDIN else os.path.realpath(name)
            if real in seen:
                raise UserError(
                    f"--input {word}: {name} is already there through {seen[real]}. Its documents "
                    "would be written twice; name it once."
                )
            seen[real] = word
            sources.append(_stat(name))
    return sources


def _expand(word: str) -> list[str]:
    if word == STDIN:
        return [STDIN]
    path = Path(word)
    if path.is_dir():
        found = sorted(
            str(file)
            for file in path.rglob("*")
            if file.name.endswith(SUFFIXES) and not _is_ours(file) and file.is_file()
        )
        if not found:
            raise UserError(
                f"--input {word}: the folder holds no file that ends in one of "
                f"{' '.join(TEXT_SUFFIXES)} (also compressed: .gz .zst .bz2 .xz) or .parquet"
            )
        return found
    if path.exists():
        return [word]
    if glob.has_magic(word):
        found = sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))  # noqa: PTH207
        if not found:
            raise UserError(f"--input {word}: the pattern matches no file")
        return found
    raise UserError(f"--input {word}: no such file or folder{_nearby(path)}")


def _is_ours(file: Path) -> bool:
    """Return whether a file in a folder is hidden, or is output of these programs."""
    return (
        file.name.startswith(".")
        or file.name.endswith("_rejected.jsonl")
        or file.parent.name.endswith(".partial")
        or file.with_suffix(".idx").exists()  # a manifest
    )


def _nearby(path: Path) -> str:
    """Return a hint on what does exist there."""
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir() if p.name.endswith(SUFFIXES))[:5]
    return f". {path.parent} holds {', '.join(names)}" if names else ""


def _stat(name: str) -> Source:
    if name == STDIN:
        return Source(STDIN)
    status = Path(name).stat()
    if not os.access(name, os.R_OK):
        raise UserError(f"--input {name}: not readable; check its permissions")
    if stat.S_ISREG(status.st_mode):
        return Source(name, status.st_size, status.st_mtime_ns, seekable=True)
    return Source(name)
