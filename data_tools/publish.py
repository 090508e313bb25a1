"""Files appear under their final names only when they are whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_llmjp.errors import UserError
from megatron_llmjp.system import sync


def publish(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Rename (work file, final file) pairs in their order; give .idx files last.

    An old .idx goes first: it must never stand beside a new .bin.
    """
    for _, final in pairs:
        if final.suffix == ".idx":
            final.unlink(missing_ok=True)
    for work, final in pairs:
        work.replace(final)
    for folder in {final.parent for _, final in pairs}:
        sync(folder)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Make a work folder, and remove it at the end with all that is still in it."""
    if folder.exists():
        shutil.rmtree(folder)  # left behind by a killed run
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError if any of these files exists and may not be replaced."""
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{', '.join(there[:3])} exists already. Choose another output, or give --overwrite "
            "to replace it."
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON and bring it to disk."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
