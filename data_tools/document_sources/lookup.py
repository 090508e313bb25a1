"""Lookup of the sources of documents in datasets, and of documents by their own id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.document_sources.columns import NO_OFFSET, DocumentSources
from data_tools.document_sources.merging import open_sources
from data_tools.document_sources.sources_file import SourcesFile
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Origin:
    """Source of one document.

    Attributes:
        file: description of its file in the list of files; ``dataset`` instead of ``name`` for a
            document of a dataset without sources that was merged.
        line: number of the line or row from 0, relative to ``first_line`` of a part of a file.
        offset: byte offset of the line in the decompressed text; None for rows of a table.
        own_id: the document's own id; empty if none is recorded.
    """

    file: dict[str, Any]
    line: int
    offset: int | None
    own_id: str

    @property
    def is_in_file(self) -> bool:
        """Whether line and offset count from the start of the file, instead of a part of it."""
        return self.file.get("first_line", 0) is not None

    def to_json(self) -> dict[str, Any]:
        """Return the source as plain values, with lines and rows counted from 1."""
        found: dict[str, Any] = {"file": self.file.get("name"), "line": self.line + 1}
        if "dataset" in self.file:
            return {"dataset": self.file["dataset"], "document": self.line}
        if not self.is_in_file:
            found = {**found, "line": None, "line_in_part": self.line + 1}
            found["bytes_of_part"] = self.file.get("bytes")
        return {**found, "offset": self.offset, "id": self.own_id or None}


class SourceLookup:
    """Sources of documents by dataset; the files are opened when they are needed."""

    def __init__(self) -> None:
        self._open = lru_cache(maxsize=None)(_open)

    def origin(self, prefix: str, document: int) -> Origin | None:
        """Return the source of a document; None if the dataset has no sources.

        Raises:
            UserError: the file of sources is missing or damaged.
        """
        reader = self._open(prefix)
        return None if reader is None else _origins(reader, document, document + 1)[0]

    def find_id(self, prefix: str, own_id: str) -> Iterator[int]:
        """Yield the documents of a dataset with an id."""
        reader, wanted = self._open(prefix), own_id.encode(errors="surrogatepass")
        for first, sources in reader.chunks() if reader is not None else ():
            if wanted in sources.ids:
                yield from (first + at for at in _with_id(sources, wanted))

    def has_ids(self, prefix: str) -> bool:
        """Return whether ids of a dataset's documents are recorded."""
        reader = self._open(prefix)
        if reader is None:
            return False
        return any(len(sources.ids) for _, sources in reader.chunks())


def _open(prefix: str) -> SourcesFile | None:
    return open_sources(prefix, read_index(prefix).documents)


def _origins(reader: SourcesFile, first: int, end: int) -> list[Origin]:
    found = reader.read(first, end)
    return [
        Origin(reader.files[file], line, None if offset == NO_OFFSET else offset, own)
        for file, line, offset, own in zip(
            found.file.tolist(),
            found.line.tolist(),
            found.offset.tolist(),
            found.id_list(),
            strict=True,
        )
    ]


def _with_id(sources: DocumentSources, wanted: bytes) -> list[int]:
    """Return the documents whose whole id is ``wanted``."""
    ends = np.cumsum(sources.id_lengths)
    starts = ends - sources.id_lengths
    chosen = np.flatnonzero(sources.id_lengths == len(wanted))
    return [int(at) for at in chosen if sources.ids[starts[at] : ends[at]] == wanted]


def format_origin(origin: Origin) -> str:
    """Return one line on the source of a document."""
    if "dataset" in origin.file:
        return f"document {origin.line:,} of {origin.file['dataset']}, which has no sources"
    name = origin.file.get("name")
    if origin.is_in_file:
        text = f"{name}:{origin.line + 1}"
    else:
        first, end = origin.file.get("bytes", (0, 0))
        text = f"{name}[bytes {first}-{end}]:{origin.line + 1}"
    if origin.offset is None:
        text += " (row)"
    else:
        text += f" (byte offset {origin.offset:,})"
    return f"{text}, id {origin.own_id}" if origin.own_id else text


def resolve_file(name: str, root: Path | None) -> str:
    """Return the current path of an input file.

    Args:
        name: its name at preprocessing.
        root: folder in which it is searched, by the longest end of its path that exists.

    Raises:
        UserError: it is not in the folder.
    """
    if root is None:
        return name
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        path = root.joinpath(*parts[start:])
        if path.is_file():
            return str(path)
    raise UserError(f"--source-root {root}: contains no file {parts[-1] if parts else name}")
