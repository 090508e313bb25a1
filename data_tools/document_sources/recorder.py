"""Recording of the sources of documents while a dataset is written, which can be resumed.

Sources are appended to work files with entries of a fixed size, from which the compact file is
written at the end. After a kill, both are cut to the number of documents that the journal records.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.document_sources.columns import DocumentSources
from data_tools.document_sources.sources_file import SourcesFileWriter
from megatron_llmjp.data.indexed_dataset_writer import open_at

ENTRY = np.dtype(
    [("line", "<i8"), ("offset", "<i8"), ("file", "<u4"), ("id_length", "<u4")],
)
ENTRIES_PER_CHUNK = 1 << 16


class SourcesRecorder:
    """Work files of the sources of documents, in the order of the documents."""

    def __init__(self, path: Path, documents: int = 0) -> None:
        """Open work files that begin with ``path``, with the first documents kept."""
        self._entries_path = path.with_suffix(".source_entries")
        self._ids_path = path.with_suffix(".source_ids")
        self._entries = open_at(self._entries_path, documents * ENTRY.itemsize)
        self._ids = open_at(self._ids_path, self._id_bytes(documents))

    def _id_bytes(self, documents: int) -> int:
        total = 0
        for first in range(0, documents, ENTRIES_PER_CHUNK):
            count = min(ENTRIES_PER_CHUNK, documents - first)
            chunk = np.fromfile(self._entries_path, ENTRY, count, offset=first * ENTRY.itemsize)
            total += int(chunk["id_length"].sum(dtype=np.int64))
        return total

    def add(self, sources: DocumentSources) -> None:
        """Append the sources of documents."""
        entries = np.empty(len(sources), ENTRY)
        entries["line"], entries["offset"] = sources.line, sources.offset
        entries["file"], entries["id_length"] = sources.file, sources.id_lengths
        self._entries.write(entries.tobytes())
        self._ids.write(sources.ids)

    def sync(self) -> None:
        """Flush the files to disk."""
        for file in (self._entries, self._ids):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files without removing them."""
        self._entries.close()
        self._ids.close()

    def write(self, path: Path, files: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the compact file, and return its entry in the manifest.

        Args:
            path: the file.
            files: description of each file.
        """
        self.close()
        writer = SourcesFileWriter(path)
        with self._entries_path.open("rb") as entries, self._ids_path.open("rb") as ids:
            while data := entries.read(ENTRIES_PER_CHUNK * ENTRY.itemsize):
                chunk = np.frombuffer(data, ENTRY)
                lengths = chunk["id_length"].astype(np.int64)
                writer.add(
                    DocumentSources(
                        chunk["file"].astype(np.int64),
                        chunk["line"].astype(np.int64),
                        chunk["offset"].astype(np.int64),
                        lengths,
                        ids.read(int(lengths.sum())),
                    )
                )
        return writer.finish(files)
