"""Output files of ``preprocess_data``, written to a work folder and renamed when complete."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.document_sources import sources_file
from data_tools.document_sources.columns import DocumentSources
from data_tools.document_sources.recorder import SourcesRecorder
from data_tools.documents import read_dataset_manifest
from data_tools.preprocess.encoding.encode import RejectedLine
from data_tools.preprocess.encoding.packed_documents import PackedDocuments
from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.job.journal import ResumeJournal, ResumePoint, SourceCounts, is_finishing
from data_tools.preprocess.job.work_folder import WorkFolder, discard_folder
from data_tools.preprocess.selection.document_records import Records
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter, WriterPosition
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import rename_into_place, write_json_durably

REJECTED = ("rejected.jsonl", "rejected.csv")


class DatasetOutput:
    """Datasets of all keys, quarantined lines, and the journal from which a run resumes."""

    def __init__(
        self,
        prefix: str,
        keys: list[str],
        dtype: np.dtype[Any],
        record_sources: bool = False,
    ) -> None:
        self.prefix, self.keys, self.dtype = prefix, keys, dtype
        self.record_sources = record_sources
        self.recorder: SourcesRecorder | None = None
        """Recorder of the sources of documents, which are the same for every key."""
        self.folder = Path(f"{prefix}.partial")
        self.writers: dict[str, IndexedDatasetWriter] = {}
        self._held: WorkFolder | None = None

    def prefix_of(self, key: str) -> str:
        """Return the prefix of a key's dataset, with Megatron-LM's naming."""
        return f"{self.prefix}_{key}_document"

    def final_paths(self) -> list[tuple[Path, Path]]:
        """Return (work file, final file) pairs in the order of renaming, with every .idx last."""
        pairs = [(self.folder / name, Path(f"{self.prefix}_{name}")) for name in REJECTED]
        for suffix in self.suffixes:
            for key in self.keys:
                pairs.append((self.folder / (key + suffix), Path(self.prefix_of(key) + suffix)))
        return pairs

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files of each dataset in the order of renaming."""
        return (".bin", *self._sources_suffix, ".json", ".idx")

    @property
    def _sources_suffix(self) -> tuple[str, ...]:
        return (sources_file.SUFFIX,) if self.record_sources else ()

    def manifests(self) -> list[dict[str, Any]]:
        """Return the manifests of datasets that exist under their final names."""
        found = []
        for key in self.keys:
            prefix = self.prefix_of(key)
            suffixes = (".bin", *self._sources_suffix, ".idx", ".json")
            paths = [Path(prefix + suffix) for suffix in suffixes]
            if all(path.exists() for path in paths):
                found.append(read_dataset_manifest(prefix) or {})
        return found

    def conflicting_files(self) -> list[Path]:
        """Return existing files under the final names that this unfinished run did not write."""
        if is_finishing(self._journal_file):
            return []
        return [final for _, final in self.final_paths()[2:] if final.exists()]

    @property
    def _journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

    def open(
        self, recipe: dict[str, Any], sources: Sequence[InputSource], overwrite: bool
    ) -> ResumeJournal:
        """Lock the work folder and open all files at the positions in the journal.

        Raises:
            FolderHeldError: another process uses the folder.
            UserError: it belongs to another run.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"--output-prefix {self.prefix}: {error.filename} is a file, not a folder"
            ) from error
        self._held = WorkFolder(self.folder)
        journal = ResumeJournal(self._journal_file, recipe, sources, overwrite=overwrite)
        last = journal.last
        if not last.finishing:
            self.open_writers(last.outputs)
            for name in REJECTED:
                with (self.folder / name).open("ab") as file:
                    file.truncate(last.rejected.get(name, 0))
        return journal

    def open_writers(self, positions: Mapping[str, WriterPosition]) -> None:
        """Open the writer of each key at the given position."""
        for key in self.keys:
            path = self.folder / f"{key}.bin"
            self.writers[key] = IndexedDatasetWriter(path, self.dtype, positions.get(key))
        self._open_recorder(self.folder, positions)

    def _open_recorder(self, folder: Path, positions: Mapping[str, WriterPosition]) -> None:
        """Open the work files of the sources in a folder, if they are recorded."""
        if self.record_sources:
            documents = positions.get(self.keys[0], WriterPosition()).documents
            self.recorder = SourcesRecorder(folder / "documents", documents)

    def check_held(self) -> None:
        """Check now and then that no other process has taken the work folder over.

        Raises:
            FolderLostError: another process has.
        """
        if self._held is not None:
            self._held.check()

    def discard(self) -> None:
        """Remove the work folder if no other process holds it: the output is complete."""
        if self._held is not None:
            self._held.remove()
        else:
            discard_folder(self.folder)

    def release(self) -> None:
        """Release the work folder, in which files may be left for a later start."""
        for writer in self.writers.values():
            writer.close()
        if self.recorder is not None:
            self.recorder.close()
        if self._held is not None:
            self._held.release()

    def add(
        self,
        packed: dict[str, PackedDocuments],
        records: dict[str, Records] | None = None,
        sources: DocumentSources | None = None,
    ) -> None:
        """Append the documents of a block to the dataset of each key.

        Args:
            packed: the documents by key.
            records: their records, for output that is arranged at the end.
            sources: their sources, if they are recorded.
        """
        for key, part in packed.items():
            self.writers[key].add(part.tokens, part.lengths, part.sequences)
        if self.recorder is not None and sources is not None:
            self.recorder.add(sources)

    def quarantine(self, source: str, line: int, bad: RejectedLine, parts: Iterator[bytes]) -> None:
        """Append a rejected line to the quarantine file, and its reason to the CSV file."""
        with (self.folder / REJECTED[0]).open("ab") as file:
            ends = b""
            for part in parts:
                file.write(part)
                ends = part[-1:]
            if ends != b"\n":
                file.write(b"\n")
        text = io.StringIO()
        if (self.folder / REJECTED[1]).stat().st_size == 0:
            csv.writer(text).writerow(["source", "line", "reason", "detail"])
        csv.writer(text).writerow([source, line, bad.reason, bad.detail])
        with (self.folder / REJECTED[1]).open("ab") as file:
            file.write(text.getvalue().encode(errors="backslashreplace"))

    def resume_point(self, source: int, position: int, counts: SourceCounts) -> ResumePoint:
        """Return the state after the last block, to resume from."""
        return ResumePoint(
            source,
            position,
            counts=copy.deepcopy(counts),
            outputs={key: writer.position for key, writer in self.writers.items()},
            rejected={name: (self.folder / name).stat().st_size for name in REJECTED},
        )

    def arrange(self, journal: ResumeJournal, counts: Sequence[SourceCounts]) -> None:
        """Arrange the documents when all input is encoded; here they are in their final order."""

    def sync_to(self, point: ResumePoint) -> None:
        """Flush all files to disk, with the data up to a point to resume from."""
        self.sync()

    def sync(self) -> None:
        """Flush all files to disk."""
        for writer in self.writers.values():
            writer.sync()
        if self.recorder is not None:
            self.recorder.sync()
        for name in REJECTED:
            with (self.folder / name).open("ab") as file:
                os.fsync(file.fileno())

    def finish(
        self,
        journal: ResumeJournal,
        manifest: Callable[[str, IndexedDatasetWriter, int], dict[str, Any]],
        files: list[dict[str, Any]],
    ) -> None:
        """Write the indices and manifests, then rename all files to their final names.

        Args:
            journal: the journal.
            manifest: returns the manifest of a key, from its writer and the CRC-32 of its .idx.
            files: descriptions of the input files, for the sources of documents.
        """
        if not journal.last.finishing:
            for key, writer in self.writers.items():
                crc = writer.finish(self.folder / f"{key}.idx")
                described = manifest(key, writer, crc)
                if self.recorder is not None:
                    path = self.folder / f"{key}{sources_file.SUFFIX}"
                    described[sources_file.MANIFEST_ENTRY] = self.recorder.write(path, files)
                write_json_durably(self.folder / f"{key}.json", described)
            for name in REJECTED:
                if (self.folder / name).stat().st_size == 0:
                    (self.folder / name).unlink()
            self.check_held()
            journal.add(dataclasses.replace(journal.last, finishing=True))
        if not self.record_sources:  # those of a dataset that is replaced
            for key in self.keys:
                Path(self.prefix_of(key) + sources_file.SUFFIX).unlink(missing_ok=True)
        rename_into_place([(work, final) for work, final in self.final_paths() if work.exists()])
        journal.close()
        if self._held is not None:
            self._held.remove()

    @contextmanager
    def name_output_in_errors(self) -> Iterator[None]:
        """Add the output folder to errors without a file name, such as a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(self.folder)
            raise
