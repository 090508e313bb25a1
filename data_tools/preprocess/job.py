"""Limits on what a run may lose: a run that rejects its input, or finds none, is no success.

One run of preprocess_data: the loop from blocks to datasets, resumable at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.common import EncodingProgress
from data_tools.preprocess.blocks import Block, LongLine, read_blocks
from data_tools.preprocess.encode import BlockEncoder, EncodedBlock, EncodingOptions, RejectedLine
from data_tools.preprocess.journal import ResumeJournal, ResumePoint, SourceCounts
from data_tools.preprocess.output import DatasetOutput
from data_tools.preprocess.pool import EncoderPool
from data_tools.preprocess.sources import InputSource
from data_tools.tables import format_table, summary_rows, write_table
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.tokenizers import Tokenizer

ENOUGH_TO_JUDGE = 1000
"""Rejected lines after which a run is stopped early if most of its lines are rejected."""


@dataclass(frozen=True)
class RejectionLimits:
    """How much may be rejected, and whether a dataset without tokens is wanted.

    Attributes:
        max_rejected: largest share of rejected lines, among rejected lines and documents.
        allow_empty: whether a dataset without tokens is written.
    """

    max_rejected: float
    allow_empty: bool

    def check_early(self, tallies: Sequence[SourceCounts]) -> None:
        """Stop a run that rejects most of its lines long before its end.

        Raises:
            UserError: more than half of the lines, and more than the limit, were rejected.
        """
        if _reasons(tallies).total() >= ENOUGH_TO_JUDGE:
            self._check_rejected(tallies, max(self.max_rejected, 0.5))

    def check(self, tallies: Sequence[SourceCounts], keys: Sequence[str]) -> None:
        """Check a run that has read all of its input.

        Raises:
            UserError: too many lines were rejected, or a dataset would be without tokens.
        """
        self._check_rejected(tallies, self.max_rejected)
        empty = [key for key in keys if not sum(tally.tokens.get(key, 0) for tally in tallies)]
        if empty and not self.allow_empty:
            lines = sum(tally.lines for tally in tallies)
            rejected = _reasons(tallies).total()
            raise UserError(
                f"no tokens for --json-keys {' '.join(empty)}: {lines:,} lines were read, "
                f"{rejected:,} of them rejected. Check --input and --json-keys, or give "
                "--allow-empty to write an empty dataset."
            )

    def _check_rejected(self, tallies: Sequence[SourceCounts], most: float) -> None:
        reasons = _reasons(tallies)
        rejected = reasons.total()
        total = rejected + sum(tally.documents for tally in tallies)
        if rejected <= most * total:
            return
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        raise UserError(
            f"{rejected:,} of {total:,} lines were rejected ({rejected / total:.1%}): {listed}. "
            f"--max-rejected is {self.max_rejected:.4%}. Fix the input or --json-keys, or give a "
            "larger --max-rejected: the same command then continues."
        )


def _reasons(tallies: Sequence[SourceCounts]) -> Counter[str]:
    """Count the rejected lines by reason."""
    reasons: Counter[str] = Counter()
    for tally in tallies:
        reasons.update(tally.rejected)
    return reasons


def parse_share(text: str) -> float:
    """Parse a share such as ``5%`` or ``0.05``, for argparse."""
    match = re.fullmatch(r"([\d.]+)(%?)", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 or text == "1":
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, found {text}")
    return value


SECONDS_BETWEEN_SAVES = 15.0
SECONDS_AFTER_A_SOURCE = 0.5  # a finished source is saved at once, unless they are tiny
WARNINGS_SHOWN = 10


class PreprocessJob:
    """One run: the sources, the tokenizer and the output, and what came of each source."""

    def __init__(
        self,
        args: argparse.Namespace,
        sources: list[InputSource],
        tokenizer: Tokenizer,
        output: DatasetOutput,
        shard: dict[str, Any] | None,
        ignored: dict[str, Any],
    ) -> None:
        self.args, self.sources, self.tokenizer, self.output = args, sources, tokenizer, output
        self.ignored = ignored
        self.encoding = EncodingOptions(
            keys=args.json_keys,
            append_eod=args.append_eod,
            keep_empty=args.on_error == "stop",
            limit=args.max_line_mb * 1_000_000,
            keep_raw=args.on_error == "quarantine",
            append_bos=args.append_bos,
        )
        self.recipe: dict[str, Any] = {
            "tokenizer": tokenizer.identity(),
            "options": {
                "keys": args.json_keys,
                "append_eod": args.append_eod,
                "on_error": args.on_error,
                "max_line_bytes": self.encoding.limit,
            },
            "sources": [source.identity() for source in sources],
        }
        for name in ("append_bos", "tokenizer_hf_include_special_tokens"):
            if getattr(args, name):
                self.recipe["options"][name] = True
        if shard is not None:
            self.recipe["shard"] = shard
        # A part of an array may have no documents: merge_datasets looks at the whole.
        self.limits = RejectionLimits(args.max_rejected, args.allow_empty or shard is not None)
        self.tallies = [SourceCounts() for _ in sources]
        self.point = ResumePoint()  # the state after the last block that was written whole
        self.warned = 0

    def is_there(self) -> bool:
        """Return whether the output is complete, made by this very recipe.

        Raises:
            UserError: there is output of another recipe.
        """
        done = self.output.manifests()
        same = [self._is_made_by(manifest.get("recipe", {})) for manifest in done]
        if len(done) == len(self.args.json_keys) and all(same):
            print("Already complete: the same input, tokenizer and options made this output.")
            self.tallies = [SourceCounts(**tally) for tally in done[0]["tallies"]]
            shutil.rmtree(self.output.folder, ignore_errors=True)
            return True
        if others := self.output.others():
            raise UserError(
                f"--output-prefix {self.args.output_prefix}: {', '.join(map(str, others))} exists "
                "already. Choose another prefix, or give --overwrite to replace it."
            )
        return False

    def _is_made_by(self, earlier: dict[str, Any]) -> bool:
        """Return whether a manifest's recipe is this one, wherever the input lies by now."""
        ours, theirs = ({**recipe, "sources": None} for recipe in (self.recipe, earlier))
        before = earlier.get("sources", [])
        if ours != theirs or len(before) != len(self.sources):
            return False
        triples = zip(self.sources, self.recipe["sources"], before, strict=True)
        return all(source.is_same(new, old) for source, new, old in triples)

    def run(self) -> int:
        """Encode what is not yet encoded, and finish."""
        journal = self.output.open(self.recipe, self.sources, self.args.overwrite)
        self._resume(journal)
        if self.sources and not self.point.finishing:
            try:
                self._encode_all(journal)
            except (UserError, OSError, KeyboardInterrupt, BrokenProcessPool):
                with contextlib.suppress(OSError):
                    self._save(journal)
                raise
            self.point.done = True
            self._save(journal)
        if not self.point.finishing:
            for source, identity in zip(self.sources, self.recipe["sources"], strict=True):
                source.refuse_changed(identity)
            self.limits.check(self.tallies, self.args.json_keys)
        self.output.finish(journal, self._manifest)
        return self.close()

    def _resume(self, journal: ResumeJournal) -> None:
        for source, tally in journal.tallies().items():
            self.tallies[source] = tally
        self.point = copy.deepcopy(journal.last)
        if journal.points:
            documents = sum(tally.documents for tally in self.tallies)
            finished = self.point.source + self.point.done
            print(
                f"Going on with {self.output.folder}: {documents:,} documents are done, "
                f"{finished:,} of {len(self.sources):,} files finished.",
                file=sys.stderr,
            )

    def _encode_all(self, journal: ResumeJournal) -> None:
        before = sum(source.length for source in self.sources[: self.point.source])
        at = self.sources[self.point.source]
        done = before + min(max(self.point.position - at.start, 0), at.length)
        progress = EncodingProgress(
            sum(s.length for s in self.sources), done, self.args.log_interval
        )
        saved = time.monotonic()
        encoder = BlockEncoder(self.tokenizer, self.encoding)
        with EncoderPool(self.args.workers, encoder) as pool:
            try:
                for source, block, encoded in pool.encode(self._blocks()):
                    changed = source != self.point.source
                    if changed:
                        before = sum(s.length for s in self.sources[:source])
                        self.point.done = True
                    age = time.monotonic() - saved
                    if age > (SECONDS_AFTER_A_SOURCE if changed else SECONDS_BETWEEN_SAVES):
                        self._save(journal)
                        saved = time.monotonic()
                    self._take(source, block, encoded)
                    tokens = sum(len(part.tokens) for part in encoded.packed.values())
                    progress.update(
                        _documents(encoded), block.size, tokens, before + block.disk_bytes
                    )
            finally:
                progress.close()

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        first = self.point.source + self.point.done
        for number in range(first, len(self.sources)):
            start = self.point.position if number == self.point.source else 0
            for block in read_blocks(
                self.sources[number], start, self.args.json_keys, self.encoding.limit
            ):
                yield number, block

    def _take(self, source: int, block: Block, encoded: EncodedBlock) -> None:
        """Write what one block gave, in the order of the input."""
        tally = self.tallies[source]
        if isinstance(block.payload, LongLine):
            detail = f"{block.size:,} bytes, --max-line-mb is {self.args.max_line_mb}"
            bad = RejectedLine(0, "line too long", detail, b"")
            self._reject(source, tally.lines + 1, bad, block.payload.parts)
        for bad in encoded.rejected:
            self._reject(source, tally.lines + bad.line + 1, bad, iter([bad.raw]))
        for line in encoded.empty:
            self._warn(
                source, tally.lines + line + 1, "empty document", "kept, as Megatron-LM does"
            )
        if encoded.impossible is not None:
            self._refuse_id(source, tally.lines + encoded.impossible[0] + 1, encoded.impossible[1])
        self.output.add(encoded.packed)
        tally.lines += encoded.lines
        tally.documents += _documents(encoded)
        tally.bytes += block.size
        tally.blank += encoded.blank
        tally.empty += len(encoded.empty)
        for key, part in encoded.packed.items():
            tally.tokens[key] = tally.tokens.get(key, 0) + len(part.tokens)
        self.point = self.output.point(source, block.end, tally)
        if encoded.rejected:
            self.limits.check_early(self.tallies)

    def _refuse_id(self, source: int, line: int, token_id: int) -> None:
        size = self.tokenizer.vocab_size
        raise UserError(
            f"{self.sources[source].label}:{line}: the tokenizer gives token id {token_id}, but "
            f"its vocabulary ends at {size - 1} and ids are stored as {self.output.dtype}. The "
            "tokenizer's files do not belong together: save the tokenizer again, or use another."
        )

    def _reject(self, source: int, line: int, bad: RejectedLine, parts: Iterator[bytes]) -> None:
        name = self.sources[source].label
        if self.args.on_error == "stop":
            detail = f" ({bad.detail})" if bad.detail else ""
            raise UserError(
                f"{name}:{line}: {bad.reason}{detail}. Fix the line and run the same command "
                "again, or go on past bad lines with --on-error skip or --on-error quarantine."
            )
        if self.args.on_error == "quarantine":
            self.output.quarantine(name, line, bad, parts)
        rejected = self.tallies[source].rejected
        rejected[bad.reason] = rejected.get(bad.reason, 0) + 1
        self._warn(source, line, bad.reason, bad.detail)

    def _warn(self, source: int, line: int, reason: str, detail: str) -> None:
        self.warned += 1
        if self.warned <= WARNINGS_SHOWN:
            what = f"{reason} ({detail})" if detail else reason
            text = f"{self.sources[source].label}:{line}: {what}"
            print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
        elif self.warned == WARNINGS_SHOWN + 1:
            print("... further bad lines are counted only", file=sys.stderr)

    def _save(self, journal: ResumeJournal) -> None:
        """Bring what was written to disk and note the point reached."""
        if self.point == journal.last:
            return
        since = range(journal.last.source, self.point.source)
        self.point.earlier = {source: self.tallies[source] for source in since}
        self.output.sync()
        journal.add(copy.deepcopy(self.point))

    def _manifest(self, key: str, writer: IndexedDatasetWriter, idx_crc: int) -> dict[str, Any]:
        """Return the manifest of one dataset: nothing in it depends on when or where it ran."""
        rejected: dict[str, int] = {}
        for tally in self.tallies:
            for reason, count in tally.rejected.items():
                rejected[reason] = rejected.get(reason, 0) + count
        return {
            "format": "megatron_llmjp dataset manifest 1",
            "key": key,
            **writer.describe(idx_crc),
            "rejected": rejected,
            "ignored": self.ignored,
            "recipe": self.recipe,
            "tallies": [vars(tally) for tally in self.tallies],
        }

    def close(self) -> int:
        """Print the closing table and write it where --report asks for it."""
        keys = self.args.json_keys
        table = summary_rows([source.label for source in self.sources], self.tallies, keys)
        print(format_table(table))
        for key in keys:
            print(f"{self.output.prefix_of(key)}.bin .idx .json")
        aside = Path(f"{self.args.output_prefix}_rejected.jsonl")
        if table[-1]["rejected"] and aside.exists():
            print(f"{aside} holds the rejected lines, {aside.with_suffix('.csv').name} the reasons")
        for path in self.args.report:
            write_table(path, table)
        return EXIT_DONE


def _documents(encoded: EncodedBlock) -> int:
    """Return how many documents a block gave, the same for every key."""
    return next((len(part.sequences) for part in encoded.packed.values()), 0)
