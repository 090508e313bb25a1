"""Output whose documents are shuffled, or compared with each other, before it is finished.

Documents and their records are first written to a staging folder: shuffled ones in sorted runs,
others in the order of the input. When all input is encoded, :meth:`ArrangedOutput.arrange` writes
the datasets from them. Both steps can be resumed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.document_sources import sources_file
from data_tools.document_sources.columns import DocumentSources, ReadSources, join_sources
from data_tools.preprocess.arrangement.arrange import ArrangedDocuments
from data_tools.preprocess.arrangement.duplicates import find_duplicates
from data_tools.preprocess.arrangement.recount import count_kept
from data_tools.preprocess.arrangement.staged_dataset import StagedDataset
from data_tools.preprocess.encoding.packed_documents import PackedDocuments, join_documents
from data_tools.preprocess.job.journal import (
    ResumeJournal,
    ResumePoint,
    SlicePosition,
    SourceCounts,
)
from data_tools.preprocess.job.output import DatasetOutput
from data_tools.preprocess.selection.document_records import Arrangement, Records
from data_tools.preprocess.selection.removal import DUPLICATES
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.data.indexed_dataset_writer import (
    IndexedDatasetWriter,
    WriterPosition,
    open_at,
)

RUN_BYTES = 64 << 20
"""Bytes of tokens and records that are sorted in memory."""
SECONDS_BETWEEN_SAVES = 15.0
ORDER_SUFFIX = ".order"
"""Suffix of the records of a part of an array, in the order of its documents."""


@dataclass
class _Block:
    """Documents of a block with their records, by key; their sources; the point after it."""

    packed: dict[str, PackedDocuments]
    records: dict[str, Records]
    sources: DocumentSources | None = None
    end: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of the tokens and records."""
        tokens = sum(part.tokens.nbytes for part in self.packed.values())
        return tokens + sum(part.nbytes for part in self.records.values())


class ArrangedOutput(DatasetOutput):
    """Datasets of all keys, whose documents are arranged at the end."""

    def __init__(
        self,
        prefix: str,
        keys: list[str],
        dtype: np.dtype[Any],
        arrangement: Arrangement,
        keep_records: bool,
        record_sources: bool = False,
    ) -> None:
        """Write to files that begin with ``prefix``.

        Args:
            prefix: of the output files.
            keys: JSON keys, one dataset each.
            dtype: of the tokens.
            arrangement: order of the documents.
            keep_records: also write the records, from which parts of an array are merged.
            record_sources: also write the sources of the documents.
        """
        super().__init__(prefix, keys, dtype, record_sources)
        self.arrangement, self.keep_records = arrangement, keep_records
        self._records: dict[str, BinaryIO] = {}
        self._added = _Block({}, {})
        self._waiting: list[_Block] = []
        self._waiting_bytes = 0
        self._is_incomplete = False
        """Whether a write was interrupted."""

    @property
    def staging(self) -> Path:
        """Folder of the documents that are not arranged yet."""
        return self.folder / "staging"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files of each dataset in the order of renaming."""
        order = (ORDER_SUFFIX,) if self.keep_records else ()
        return (".bin", *order, *self._sources_suffix, ".json", ".idx")

    def open_writers(self, positions: Mapping[str, WriterPosition]) -> None:
        """Open the staging files at the given positions."""
        self.staging.mkdir(exist_ok=True)
        for key in self.keys:
            position = positions.get(key)
            writer = IndexedDatasetWriter(self.staging / f"{key}.bin", self.dtype, position)
            self.writers[key] = writer
            size = writer.position.documents * self.arrangement.dtype.itemsize
            self._records[key] = open_at(self.staging / f"{key}.records", size)
        self._open_recorder(self.staging, positions)

    def add(
        self,
        packed: dict[str, PackedDocuments],
        records: dict[str, Records] | None = None,
        sources: DocumentSources | None = None,
    ) -> None:
        """Add the documents of a block, which are kept in memory until a run is complete."""
        assert records is not None
        if self._waiting_bytes >= RUN_BYTES:
            self._write_run()
        self._added = _Block(packed, records, sources)

    def resume_point(self, source: int, position: int, counts: SourceCounts) -> ResumePoint:
        """Return the state after the last block, without the positions of the writers."""
        point = super().resume_point(source, position, counts)
        self._added.end = (source, position)
        if self._added.packed:  # none of a line above the limit
            self._waiting.append(self._added)
        self._waiting_bytes += self._added.size
        return point

    def _write_run(self) -> None:
        """Write the documents in memory; sorted if they are shuffled.

        Raises:
            OSError: an earlier call was interrupted, and files are ahead of the last point.
        """
        if self._is_incomplete:
            raise OSError(f"{self.staging}: an earlier write was interrupted")
        if not self._waiting:
            return
        self._is_incomplete = True
        for key in self.keys:
            documents = join_documents([block.packed[key] for block in self._waiting], self.dtype)
            records = np.concatenate([block.records[key] for block in self._waiting])
            sources = None
            if self.recorder is not None and key == self.keys[0]:
                sources = join_sources([b.sources for b in self._waiting if b.sources is not None])
            if self.arrangement.shuffle_seed is not None:
                order = np.argsort(self.arrangement.sort_keys(records))
                documents, records = documents.take(order), records[order]
                sources = sources and sources.take(order)
            if self.recorder is not None and sources is not None:
                self.recorder.add(sources)
            self.writers[key].add(documents.tokens, documents.lengths, documents.sequences)
            self._records[key].write(records.tobytes())
        self._waiting.clear()
        self._waiting_bytes = 0
        self._is_incomplete = False

    def sync_to(self, point: ResumePoint) -> None:
        """Write the documents up to a point, flush all files, and set its positions."""
        at = (point.source, point.position)
        self._waiting = [block for block in self._waiting if block.end <= at]
        self._write_run()
        self.sync()
        point.outputs = {key: writer.position for key, writer in self.writers.items()}

    def sync(self) -> None:
        """Flush all files to disk."""
        for file in self._records.values():
            file.flush()
            os.fsync(file.fileno())
        super().sync()

    def release(self) -> None:
        """Close all files, and release the work folder."""
        for file in self._records.values():
            file.close()
        super().release()

    def arrange(self, journal: ResumeJournal, counts: Sequence[SourceCounts]) -> None:
        """Write the datasets from the staged documents, and count what duplicates leave.

        Args:
            journal: its last point has all input encoded.
            counts: counts of the sources, changed in place.
        """
        for key, file in self._records.items():
            file.close()
            self.writers[key].finish(self.staging / f"{key}.idx")
        sources = None
        if self.recorder is not None:
            path = self.staging / f"documents{sources_file.SUFFIX}"
            self.recorder.write(path, [{"name": ""} for _ in counts])
            sources = sources_file.SourcesFile(path).read
        staged = {key: self._staged(key, sources) for key in self.keys}
        removed: npt.NDArray[Any] | None = None
        if self.arrangement.remove_duplicates:
            (removed,) = find_duplicates([staged[self.keys[0]]], self.folder / "duplicates")
            for key, dataset in staged.items():
                _recount(key, dataset, removed, counts)
        positions = dict(journal.last.arranged)
        outputs = {key: position.output for key, position in positions.items()}
        self._open_recorder(self.folder, outputs)
        for key, dataset in staged.items():
            self._arrange_key(key, dataset, removed, journal, positions)
        last = dataclasses.replace(
            journal.last,
            counts=counts[journal.last.source] if counts else SourceCounts(),
            finished=dict(enumerate(counts)),
            arranged=positions,
        )
        journal.add(last)

    def _staged(self, key: str, sources: ReadSources | None) -> StagedDataset:
        index = read_index(self.staging / key)
        records = self.staging / f"{key}.records"
        dataset = StagedDataset(index, records, self.arrangement.dtype, sources)
        dataset.check()
        return dataset

    def _arrange_key(
        self,
        key: str,
        dataset: StagedDataset,
        removed: npt.NDArray[Any] | None,
        journal: ResumeJournal,
        positions: dict[str, SlicePosition],
    ) -> None:
        """Write one dataset from the last saved slice on."""
        at = positions.get(key, SlicePosition())
        documents = ArrangedDocuments.of(
            [dataset], self.arrangement, None if removed is None else [removed]
        )
        writer = IndexedDatasetWriter(self.folder / f"{key}.bin", self.dtype, at.output)
        self.writers[key] = writer
        size = at.output.documents * self.arrangement.dtype.itemsize
        records_file = open_at(self.folder / f"{key}{ORDER_SUFFIX}", size)
        saved = shown = time.monotonic()
        is_first_key = key == self.keys[0]
        with records_file:
            for number, parts in enumerate(documents.slice_parts(at.slices), at.slices + 1):
                self.check_held()
                for packed, records, sources in parts:
                    writer.add(packed.tokens, packed.lengths, packed.sequences)
                    records_file.write(records.tobytes())
                    if self.recorder is not None and sources is not None and is_first_key:
                        self.recorder.add(sources)
                now, is_last = time.monotonic(), number == documents.slices
                if is_last or now - shown > SECONDS_BETWEEN_SAVES:
                    shown = now
                    self._show(key, number, documents.slices)
                if is_last or now - saved > SECONDS_BETWEEN_SAVES:
                    saved = now
                    records_file.flush()
                    os.fsync(records_file.fileno())
                    if self.recorder is not None:
                        self.recorder.sync()
                    positions[key] = SlicePosition(number, writer.sync())
                    journal.add(dataclasses.replace(journal.last, arranged=dict(positions)))

    def _show(self, key: str, done: int, slices: int) -> None:
        steps = {
            "removing duplicates": self.arrangement.remove_duplicates,
            "shuffling": self.arrangement.shuffle_seed is not None,
        }
        text = " and ".join(name for name, wanted in steps.items() if wanted)
        print(f"{key}: {text}: {done / slices:.0%}", file=sys.stderr, flush=True)


def _recount(
    key: str, dataset: StagedDataset, removed: npt.NDArray[Any], counts: Sequence[SourceCounts]
) -> None:
    """Set the counts of each source to those of the documents that are kept."""
    names = {number: found.texts.get(key, {}) for number, found in enumerate(counts)}
    kept = count_kept(dataset, removed, names)
    for number, source_counts in enumerate(counts):
        if number not in kept:
            continue
        total = kept[number].total
        source_counts.documents = total.documents
        source_counts.tokens[key] = total.tokens
        source_counts.texts[key] = kept[number].languages
        source_counts.removed[DUPLICATES] = kept[number].duplicates
