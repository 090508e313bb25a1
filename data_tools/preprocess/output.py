"""The files a run makes: written in a work folder, renamed to their names when complete."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.documents import read_manifest
from data_tools.preprocess.encode import PackedDocuments, RejectedLine
from data_tools.preprocess.journal import ResumeJournal, ResumePoint, SourceCounts, is_finishing
from data_tools.preprocess.sources import InputSource
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import FileLock, acquire_lock, rename_into_place, write_json_durably

REJECTED = ("rejected.jsonl", "rejected.csv")


class DatasetOutput:
    """The datasets of all keys, the lines put aside, and the journal that makes them resumable."""

    def __init__(self, prefix: str, keys: list[str], dtype: np.dtype[Any]) -> None:
        self.prefix, self.keys, self.dtype = prefix, keys, dtype
        self.folder = Path(f"{prefix}.partial")
        self.writers: dict[str, IndexedDatasetWriter] = {}
        self._lock: FileLock | None = None

    def prefix_of(self, key: str) -> str:
        """Return the prefix of one key's dataset, as Megatron-LM names it."""
        return f"{self.prefix}_{key}_document"

    def finals(self) -> list[tuple[Path, Path]]:
        """Return (work file, final file) in the order of renaming: every .idx last."""
        pairs = [(self.folder / name, Path(f"{self.prefix}_{name}")) for name in REJECTED]
        for suffix in (".bin", ".json", ".idx"):
            for key in self.keys:
                pairs.append((self.folder / (key + suffix), Path(self.prefix_of(key) + suffix)))
        return pairs

    def manifests(self) -> list[dict[str, Any]]:
        """Return the manifests of the datasets that are there under their final names."""
        found = []
        for key in self.keys:
            prefix = self.prefix_of(key)
            paths = [Path(prefix + suffix) for suffix in (".bin", ".idx", ".json")]
            if all(path.exists() for path in paths):
                found.append(read_manifest(prefix) or {})
        return found

    def others(self) -> list[Path]:
        """Return files under the final names that are not this unfinished run's own."""
        if is_finishing(self._journal_file):
            return []
        return [final for _, final in self.finals()[2:] if final.exists()]

    @property
    def _journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

    def open(
        self, recipe: dict[str, Any], sources: Sequence[InputSource], overwrite: bool
    ) -> ResumeJournal:
        """Lock the work folder and open everything where the journal says.

        Raises:
            UserError: another process is at work, or the folder belongs to another run.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--output-prefix {self.prefix}: {error.filename} is a file") from error
        self._take_lock()
        journal = ResumeJournal(self._journal_file, recipe, sources, forget_others=overwrite)
        last = journal.last
        if not last.finishing:
            for key in self.keys:
                self.writers[key] = IndexedDatasetWriter(
                    self.folder / f"{key}.bin", self.dtype, last.outputs.get(key)
                )
            for name in REJECTED:
                with (self.folder / name).open("ab") as file:
                    file.truncate(last.rejected.get(name, 0))
        return journal

    def _take_lock(self) -> None:
        try:
            self._lock = acquire_lock(self.folder / "lock")
        except BlockingIOError as error:
            raise UserError(
                f"{self.folder}: another preprocess_data is writing this output. Wait for it, or "
                "choose another --output-prefix."
            ) from error

    def add(self, packed: dict[str, PackedDocuments]) -> None:
        """Append the documents of a block to each key's dataset."""
        for key, part in packed.items():
            self.writers[key].add(part.tokens, part.lengths, part.sequences)

    def quarantine(self, source: str, line: int, bad: RejectedLine, parts: Iterator[bytes]) -> None:
        """Append a rejected line to the quarantine, and why it is there."""
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

    def point(self, source: int, position: int, tally: SourceCounts) -> ResumePoint:
        """Return the state after the last block, to be saved now or later."""
        return ResumePoint(
            source,
            position,
            tally=copy.deepcopy(tally),
            outputs={key: writer.position for key, writer in self.writers.items()},
            rejected={name: (self.folder / name).stat().st_size for name in REJECTED},
        )

    def sync(self) -> None:
        """Bring everything to disk."""
        for writer in self.writers.values():
            writer.sync()
        for name in REJECTED:
            with (self.folder / name).open("ab") as file:
                os.fsync(file.fileno())

    def finish(
        self, journal: ResumeJournal, manifest: Callable[[str, IndexedDatasetWriter, int], Any]
    ) -> None:
        """Write the indexes and manifests, then rename everything into place."""
        if not journal.last.finishing:
            for key, writer in self.writers.items():
                crc = writer.finish(self.folder / f"{key}.idx")
                write_json_durably(self.folder / f"{key}.json", manifest(key, writer, crc))
            for name in REJECTED:
                if (self.folder / name).stat().st_size == 0:
                    (self.folder / name).unlink()
            journal.add(dataclasses.replace(journal.last, finishing=True))
        rename_into_place([(work, final) for work, final in self.finals() if work.exists()])
        journal.close()
        shutil.rmtree(self.folder)
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def name_output_in_errors(self) -> Iterator[None]:
        """Name the output folder in errors that name no file, such as a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(self.folder)
            raise
