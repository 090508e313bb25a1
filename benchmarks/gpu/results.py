"""Results of one part, written to a JSON file after every row so that a time-out keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.scale import Scale
from megatron_llmjp.filesystem import write_atomically

NEEDS_GPU = "needs a GPU"
"""Value of what cannot be measured on a CPU."""

Row = Mapping[str, Any]


class SkippedError(Exception):
    """A part that this machine cannot run; the message gives the reason."""


@dataclass
class Results:
    """Tables and notes of one part."""

    path: Path
    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Rows by table; the keys of a row are the headings, with units."""
    notes: list[str] = field(default_factory=list)

    def add(self, table: str, row: Row) -> None:
        """Append a row to a table and write the file."""
        self.tables.setdefault(table, []).append(dict(row))
        self._write()

    def note(self, text: str) -> None:
        """Append a note and write the file."""
        self.notes.append(text)
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"tables": self.tables, "notes": self.notes})


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file; NaN and Inf are written as text, which JSON does not have."""
    write_atomically(path, json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return str(value)
    return value


@dataclass(frozen=True)
class Context:
    """What a part runs on."""

    device: str
    """``cuda`` or ``cpu``."""
    scale: Scale
    work: Path
    """Folder for data and checkpoints."""
    results: Results

    @property
    def is_cuda(self) -> bool:
        """Whether the part runs on a GPU."""
        return self.device == "cuda"
