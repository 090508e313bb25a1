"""One run of ``preprocess_data``: the loop from blocks to datasets, which can be resumed."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from data_tools.common import EncodingProgress
from data_tools.document_sources.files import describe_files
from data_tools.document_sources.sources_file import SUFFIX
from data_tools.documents import MANIFEST_FORMAT
from data_tools.preprocess.encoding.encode import BlockEncoder, EncodedBlock, RejectedLine
from data_tools.preprocess.encoding.pool import EncoderPool
from data_tools.preprocess.encoding.text_counts import add_texts
from data_tools.preprocess.input.blocks import Block, LongLine, read_blocks
from data_tools.preprocess.input.remote_changes import refuse_changed_remote
from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.job.journal import ResumeJournal, ResumePoint, SourceCounts
from data_tools.preprocess.job.output import DatasetOutput
from data_tools.preprocess.job.recipe import encoding_options, make_recipe
from data_tools.preprocess.job.rejection import RejectionLimits
from data_tools.preprocess.job.status import Amount, RateMeter, StatusWriter, amount_of
from data_tools.preprocess.job.work_folder import FolderLostError
from data_tools.preprocess.selection.document_records import place_records, place_sources
from data_tools.preprocess.selection.removal import add_removed
from data_tools.preprocess.selection.selection import Selection
from data_tools.statistics.counts import describe_sources, read_sources
from data_tools.statistics.removed import describe_removed
from data_tools.tables import format_rows, summary_rows, write_table
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.tokenizers import Tokenizer

SECONDS_BETWEEN_SAVES = 15.0
SECONDS_AFTER_A_SOURCE = 0.5  # a finished source is saved immediately, unless sources are tiny
MAX_WARNINGS_PRINTED = 10


class PreprocessJob:
    """One run: the sources, the tokenizer, the output, and the counts of each source."""

    def __init__(
        self,
        args: argparse.Namespace,
        sources: list[InputSource],
        tokenizer: Tokenizer,
        output: DatasetOutput,
        shard: dict[str, Any] | None,
        ignored: dict[str, Any],
        selection: Selection,
        array_total: int = 0,
        on_status: Callable[[], None] = lambda: None,
        meter: RateMeter | None = None,
    ) -> None:
        """Prepare a job; ``array_total`` and ``shard`` describe the array that it is a part of.

        ``on_status`` is called whenever the status file is written.
        """
        self.args, self.sources, self.tokenizer, self.output = args, sources, tokenizer, output
        self.ignored = ignored
        self.array_total, self.on_status = array_total, on_status
        self.meter = meter or RateMeter()
        self.status: StatusWriter | None = None
        self.encoding = encoding_options(args, selection)
        self.selection = selection
        self.recipe = make_recipe(args, tokenizer, sources, selection, shard)
        # A part of an array may have no documents: merge_datasets checks the merged dataset.
        self.limits = RejectionLimits(args.max_rejected, args.allow_empty or shard is not None)
        reasons = selection.removal_reasons()
        self.counts = [SourceCounts(removed=dict.fromkeys(reasons, 0)) for _ in sources]
        self.point = ResumePoint()  # the state after the last block that was written
        self.warned = self.rejected = 0

    def is_complete(self) -> bool:
        """Return whether the complete output of this recipe exists.

        Raises:
            UserError: output of another recipe exists.
        """
        done = self.output.manifests()
        same = [self._is_made_by(manifest.get("recipe", {})) for manifest in done]
        if len(done) == len(self.args.json_keys) and all(same):
            print("Already complete: written before with the same input, tokenizer and options.")
            self.counts = self._recorded_counts(done[0])
            self._add_recorded_texts(done)
            self.output.discard()
            return True
        if conflicting_files := self.output.conflicting_files():
            for manifest in done:
                earlier, prefix = manifest.get("recipe", {}).get("sources"), self.output.prefix
                refuse_changed_remote(self.sources, self.recipe["sources"], earlier, prefix)
            raise UserError(
                f"--output-prefix {self.args.output_prefix}: "
                f"{', '.join(map(str, conflicting_files))} already exists. Choose another prefix, "
                "or give --overwrite to replace it."
            )
        return False

    def _recorded_counts(self, manifest: dict[str, Any]) -> list[SourceCounts]:
        """Return the counts of each source in the manifest of a finished dataset."""
        count = len(self.sources)
        each_source = Annotated[list[SourceCounts], Field(min_length=count, max_length=count)]
        try:
            return TypeAdapter(each_source).validate_python(manifest.get("tallies"))
        except ValidationError as error:
            path = f"{self.output.prefix_of(self.args.json_keys[0])}.json"
            raise UserError(
                f"{path}: the manifest is damaged ({error.errors()[0]['msg']})"
            ) from None

    def _add_recorded_texts(self, manifests: list[dict[str, Any]]) -> None:
        """Add the counts of documents in the manifests of all keys; earlier versions have none."""
        for key, manifest in zip(self.args.json_keys, manifests, strict=True):
            with contextlib.suppress(ValueError):
                recorded = read_sources(manifest.get("statistics")).values()
                for source_counts, languages in zip(self.counts, recorded, strict=True):
                    source_counts.texts[key] = languages

    def _is_made_by(self, recorded: dict[str, Any]) -> bool:
        """Return whether a manifest has the same recipe, regardless of the paths of the input."""
        both = (self.recipe, recorded)
        ours, theirs = ({**recipe, "sources": None, "encoders": None} for recipe in both)
        before = recorded.get("sources", [])
        if ours != theirs or len(before) != len(self.sources):
            return False
        triples = zip(self.sources, self.recipe["sources"], before, strict=True)
        return all(source.is_same(new, old) for source, new, old in triples)

    def run(self) -> int:
        """Encode the remaining input, and finish the output.

        Raises:
            FolderHeldError: another process writes this output.
        """
        try:
            journal = self.output.open(self.recipe, self.sources, self.args.overwrite)
            if self.args.overwrite or not self.is_complete():  # else another process was faster
                self._run(journal)
        finally:
            self.output.release()
        return self.print_summary()

    def _run(self, journal: ResumeJournal) -> None:
        self._resume(journal)
        self.status = StatusWriter(
            self.output.folder,
            sum(source.length for source in self.sources),
            len(self.sources),
            self.array_total,
            (self.point.source, self.point.position),
            self.meter,
        )
        with self.status.recorded_outcome():
            self._encode_and_check(journal)
            self.status.change("finishing")
            self.output.check_held()
            files = describe_files(self.sources) if self.args.record_sources else []
            self.output.finish(journal, self._manifest, files)

    def _encode_and_check(self, journal: ResumeJournal) -> None:
        if self.sources and not self.point.finishing:
            try:
                self._encode_all(journal)
            except (UserError, OSError, KeyboardInterrupt, BrokenProcessPool) as error:
                if not isinstance(error, FolderLostError):
                    with contextlib.suppress(OSError):
                        self._save(journal)
                raise
            self.output.check_held()
            self.point.done = True
            self._save(journal)
        if not self.point.finishing:
            for source, identity in zip(self.sources, self.recipe["sources"], strict=True):
                source.refuse_changed(identity)
            self.limits.check(self.counts, self.args.json_keys)
            self.output.arrange(journal, self.counts)

    def _resume(self, journal: ResumeJournal) -> None:
        for source, source_counts in journal.counts_by_source().items():
            self.counts[source] = source_counts
        self.point = copy.deepcopy(journal.last)
        self.rejected = sum(sum(counts.rejected.values()) for counts in self.counts)
        if journal.points:
            documents = sum(source_counts.documents for source_counts in self.counts)
            finished = self.point.source + self.point.done
            print(
                f"Resuming {self.output.folder}: {documents:,} documents are done, "
                f"{finished:,} of {len(self.sources):,} files finished.",
                file=sys.stderr,
            )

    def _encode_all(self, journal: ResumeJournal) -> None:
        before = sum(source.length for source in self.sources[: self.point.source])
        at = self.sources[self.point.source]
        done = before + min(max(self.point.position - at.start, 0), at.length)
        earlier = dataclasses.replace(amount_of(self.counts), disk=done)
        if self.status is not None:
            self.status.begin(earlier)
        progress = EncodingProgress(
            sum(s.length for s in self.sources),
            done,
            self.args.log_interval,
            int(earlier.documents),
            int(earlier.tokens),
        )
        saved = time.monotonic()
        encoder = BlockEncoder(self.tokenizer, self.encoding)
        with EncoderPool(self.args.workers, encoder) as pool:
            try:
                for source, block, encoded in pool.encode(self._blocks()):
                    self.output.check_held()
                    changed = source != self.point.source
                    if changed:
                        before = sum(s.length for s in self.sources[:source])
                        self.point.done = True
                    age = time.monotonic() - saved
                    # Each save ends a run of sorted documents: those should not be short.
                    early = changed and self.encoding.record_dtype is None
                    if age > (SECONDS_AFTER_A_SOURCE if early else SECONDS_BETWEEN_SAVES):
                        self._save(journal)
                        saved = time.monotonic()
                    self._write_block(source, block, encoded)
                    tokens = sum(len(part.tokens) for part in encoded.packed.values())
                    progress.update(
                        _documents(encoded), block.size, tokens, before + block.disk_bytes
                    )
                    self._record_progress(earlier, progress, source)
            finally:
                progress.close()

    def _record_progress(self, earlier: Amount, now: EncodingProgress, finished: int) -> None:
        """Update the status file, and report the progress of all parts now and then."""
        disk = now.disk - now.first_disk
        done = earlier + Amount(max(disk, 0), now.bytes, now.documents, now.tokens)
        if self.status is not None and self.status.update(done, finished, self.rejected):
            self.on_status()

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        first = self.point.source + self.point.done
        for number in range(first, len(self.sources)):
            start = self.point.position if number == self.point.source else 0
            for block in read_blocks(
                self.sources[number],
                start,
                self.encoding.columns,
                self.encoding.limit,
                self.encoding.optional_columns,
            ):
                yield number, block

    def _write_block(self, source: int, block: Block, encoded: EncodedBlock) -> None:
        """Write the documents of one block, in input order, and update the counts."""
        source_counts = self.counts[source]
        if isinstance(block.payload, LongLine):
            detail = f"{block.size:,} bytes, --max-line-mb is {self.args.max_line_mb}"
            bad = RejectedLine(0, "line too long", detail, b"")
            self._reject(source, source_counts.lines + 1, bad, block.payload.parts)
        for bad in encoded.rejected:
            self._reject(source, source_counts.lines + bad.line + 1, bad, iter([bad.raw]))
        for line in encoded.empty:
            self._warn(
                source,
                source_counts.lines + line + 1,
                "empty document",
                "kept, as Megatron-LM does",
            )
        if encoded.invalid_id is not None:
            line, token_id = encoded.invalid_id
            self._raise_invalid_id(source, source_counts.lines + line + 1, token_id)
        file_number = self.selection.file_numbers[self.sources[source].name]
        records = place_records(encoded.records, block, source, file_number)
        sources = place_sources(encoded.sources, block, source, source_counts.lines)
        self.output.add(encoded.packed, records, sources)
        source_counts.lines += encoded.lines
        source_counts.documents += _documents(encoded)
        source_counts.bytes += block.size
        source_counts.blank += encoded.blank
        source_counts.empty += len(encoded.empty)
        for key, part in encoded.packed.items():
            source_counts.tokens[key] = source_counts.tokens.get(key, 0) + len(part.tokens)
        add_texts(source_counts.texts, encoded.texts)
        add_removed(source_counts.removed, encoded.removed)
        self.point = self.output.resume_point(source, block.end, source_counts)
        if encoded.rejected:
            self.limits.check_early(self.counts)

    def _raise_invalid_id(self, source: int, line: int, token_id: int) -> None:
        size = self.tokenizer.vocab_size
        raise UserError(
            f"{self.sources[source].label}:{line}: the tokenizer returned token id {token_id}, but "
            f"the largest id of its vocabulary is {size - 1} and ids are stored as "
            f"{self.output.dtype}. The tokenizer's files are inconsistent: save the tokenizer "
            "again, or use another one."
        )

    def _reject(self, source: int, line: int, bad: RejectedLine, parts: Iterator[bytes]) -> None:
        name = self.sources[source].label
        if self.args.on_error == "stop":
            detail = f" ({bad.detail})" if bad.detail else ""
            raise UserError(
                f"{name}:{line}: {bad.reason}{detail}. Fix the line and run the same command "
                "again, or continue after bad lines with --on-error skip or --on-error quarantine."
            )
        if self.args.on_error == "quarantine":
            self.output.quarantine(name, line, bad, parts)
        self.rejected += 1
        rejected = self.counts[source].rejected
        rejected[bad.reason] = rejected.get(bad.reason, 0) + 1
        self._warn(source, line, bad.reason, bad.detail)

    def _warn(self, source: int, line: int, reason: str, detail: str) -> None:
        self.warned += 1
        if self.warned <= MAX_WARNINGS_PRINTED:
            what = f"{reason} ({detail})" if detail else reason
            text = f"{self.sources[source].label}:{line}: {what}"
            print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
        elif self.warned == MAX_WARNINGS_PRINTED + 1:
            print("... further bad lines are only counted", file=sys.stderr)

    def _save(self, journal: ResumeJournal) -> None:
        """Flush the output to disk and record the point reached."""
        if self.point == journal.last:
            return
        since = range(journal.last.source, self.point.source)
        self.point.finished = {source: self.counts[source] for source in since}
        self.output.sync_to(self.point)
        journal.add(copy.deepcopy(self.point))

    def _manifest(self, key: str, writer: IndexedDatasetWriter, idx_crc: int) -> dict[str, Any]:
        """Return the manifest of one dataset, which is independent of time and place of the run."""
        rejected: dict[str, int] = {}
        for source_counts in self.counts:
            for reason, count in source_counts.rejected.items():
                rejected[reason] = rejected.get(reason, 0) + count
        return {
            "format": MANIFEST_FORMAT,
            "key": key,
            **writer.describe(idx_crc),
            "rejected": rejected,
            "ignored": self.ignored,
            "recipe": self.recipe,
            "tallies": [
                {
                    name: value
                    for name, value in vars(source_counts).items()
                    if name != "texts" and (name != "removed" or value)
                }
                for source_counts in self.counts
            ],
            "statistics": self._statistics(key),
        }

    def _statistics(self, key: str) -> dict[str, Any]:
        by_source = list(zip(self.sources, self.counts, strict=True))
        kept = {source.name: counts.texts.get(key, {}) for source, counts in by_source}
        removed = {source.name: counts.removed for source, counts in by_source}
        return {**describe_sources(kept), **describe_removed(removed)}

    def print_summary(self) -> int:
        """Print the summary table, and write it to the --report files."""
        keys = self.args.json_keys
        table = summary_rows([source.label for source in self.sources], self.counts, keys)
        print(format_rows(table))
        for key in keys:
            more = f" {SUFFIX}" if self.args.record_sources else ""
            print(f"{self.output.prefix_of(key)}.bin .idx .json{more}")
        quarantined = Path(f"{self.args.output_prefix}_rejected.jsonl")
        if table[-1]["rejected"] and quarantined.exists():
            print(f"{quarantined}: rejected lines; {quarantined.with_suffix('.csv').name}: reasons")
        for path in self.args.report:
            write_table(path, table)
        return EXIT_DONE


def _documents(encoded: EncodedBlock) -> int:
    """Return the number of documents of a block, which is the same for every key."""
    return next((len(part.sequences) for part in encoded.packed.values()), 0)
