"""Look into indexed datasets: statistics, documents as text, and whether they are whole.

With ``--run`` into what a run was trained on: ``lineage_report.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools import lineage_report
from data_tools.common import ToolParser, run_tool
from data_tools.documents import document_chunks, read_manifest
from data_tools.tables import format_table
from data_tools.tokenizer_flags import add_tokenizer_flags, tokenizer_of
from data_tools.verify_dataset import verify
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.data.indexed_dataset import DatasetIndex, read_and_check_index
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, DataError, UserError
from megatron_llmjp.tokenizers import Tokenizer

BINS = 40  # powers of two: documents of up to 2^39 tokens
BAR = 40

EXAMPLES = """\
  Statistics and a histogram of document lengths, also as a picture:
    inspect_dataset data/ja_text_document --png lengths.png

  The first, the eighth and the last document as text:
    inspect_dataset data/ja_text_document --documents 0 7 -1 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model

  Is every dataset whole? (exit code 1 if one is not)
    inspect_dataset --verify data/*.idx

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    examples = EXAMPLES + lineage_report.EXAMPLES
    parser = ToolParser("inspect_dataset", "Look into .bin/.idx token datasets and runs.", examples)
    add = parser.add_argument
    add("prefixes", nargs="*", metavar="PREFIX", help="path without .bin or .idx (or with)")
    add(
        "--verify",
        action="store_true",
        help="read all and check it; ids by --vocab-size",
    )
    add("--documents", type=int, nargs="+", default=[], metavar="N", help="show these; -1: last")
    add("--max-tokens", type=positive_int, default=200, metavar="N", help="shown of each document")
    add_tokenizer_flags(add, required=False, use="to show text, not ids: ")
    add("--png", type=Path, metavar="FILE", help="write the histogram as a picture")
    add("--json", action="store_true", help="statistics as JSON")
    lineage_report.add_flags(parser.add_argument_group("what a run was trained on").add_argument)
    args = parser.parse(argv)
    if args.run is not None:
        return run_tool("inspect_dataset", lambda: lineage_report.report_lineage(args))
    if not args.prefixes:
        parser.error("give datasets, or --run FOLDER")
    return run_tool("inspect_dataset", lambda: inspect(args))


def inspect(args: argparse.Namespace) -> int:
    """Do what the flags ask for, for each dataset."""
    prefixes = [word.removesuffix(".idx").removesuffix(".bin") for word in args.prefixes]
    if args.verify:
        return verify_all(prefixes, args.vocab_size)
    tokenizer = None
    if args.tokenizer_type:
        tokenizer = tokenizer_of(args)
    indexes = [read_and_check_index(prefix) for prefix in prefixes]
    if args.documents:
        for index in indexes:
            for number in args.documents:
                print(show_document(index, number, tokenizer, args.max_tokens))
        return EXIT_DONE
    found = [statistics(index) for index in indexes]
    if args.json:
        print(json.dumps([stats | {"histogram": h.tolist()} for stats, h in found], indent=1))
    else:
        print(format_table([stats for stats, _ in found]))
        for index, (_, histogram) in zip(indexes, found, strict=True):
            print(f"\n{index.prefix}: documents by length in tokens\n{draw(histogram)}")
    if args.png:
        write_png(args.png, {str(i.prefix): h for i, (_, h) in zip(indexes, found, strict=True)})
    return EXIT_DONE


def verify_all(prefixes: list[str], vocab_size: int | None) -> int:
    """Verify each dataset, print the findings and return the exit code."""
    code = EXIT_DONE
    for prefix in prefixes:
        try:
            checked, wrong = verify(prefix, vocab_size)
        except (DataError, UserError) as error:
            checked, wrong = [], [str(error)]
        print(f"{prefix}: {'DAMAGED' if wrong else 'ok'} ({'; '.join(checked)})")
        for finding in wrong:
            print(f"  {finding}")
            code = EXIT_FAILURE
    return code


def statistics(index: DatasetIndex) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Return a table row, and how many documents have 0, 1, 2-3, 4-7 ... tokens."""
    histogram = np.zeros(BINS, np.int64)
    sizes: list[npt.NDArray[np.int64]] = []
    for piece in document_chunks(index):
        totals = np.concatenate(([0], np.cumsum(piece.lengths, dtype=np.int64)))
        ends = np.cumsum(piece.sequences, dtype=np.int64)
        lengths = np.diff(totals[np.concatenate(([0], ends))])
        sizes.append(lengths)
        bins = np.where(lengths > 0, np.log2(np.maximum(lengths, 1)).astype(int) + 1, 0)
        histogram += np.bincount(bins, minlength=BINS)[:BINS]
    lengths = np.concatenate(sizes) if sizes else np.zeros(1, np.int64)
    tokens = int(lengths.sum())
    row = {
        "dataset": str(index.prefix),
        "documents": index.documents,
        "sequences": index.sequences,
        "tokens": tokens,
        "dtype": index.dtype.name,
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
        "manifest": "yes" if read_manifest(index.prefix) else "no",
    }
    return row, histogram


def bin_names(histogram: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return the filled range of a histogram, by the lengths that each bin stands for."""
    filled = np.flatnonzero(histogram)
    if not len(filled):
        return {}
    names = ["0", "1", *(f"{2 ** (i - 1):,}-{2**i - 1:,}" for i in range(2, BINS))]
    return {names[i]: int(histogram[i]) for i in range(filled[0], filled[-1] + 1)}


def draw(histogram: npt.NDArray[np.int64]) -> str:
    """Return a histogram as text."""
    named = bin_names(histogram)
    most = max(named.values(), default=1)
    width = max(map(len, named), default=0)
    return "\n".join(
        f"{name:>{width}} {'█' * round(BAR * count / most):{BAR}} {count:,}"
        for name, count in named.items()
    )


def write_png(path: Path, histograms: dict[str, npt.NDArray[np.int64]]) -> None:
    """Draw the histograms over each other."""
    from matplotlib.figure import Figure  # here: it takes half a second to import

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, histogram in histograms.items():
        last = int(np.flatnonzero(histogram)[-1]) if histogram.any() else 0
        edges = np.concatenate(([0.5], 2.0 ** np.arange(last + 1)))
        axes.stairs(histogram[: last + 1], edges, fill=len(histograms) == 1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise UserError(f"--png {path}: {error}") from error


def show_document(index: DatasetIndex, number: int, tokenizer: Tokenizer | None, most: int) -> str:
    """Return one document with a heading; a long one is cut.

    Raises:
        UserError: there is no such document.
    """
    position = number + index.documents if number < 0 else number
    if not 0 <= position < index.documents:
        raise UserError(
            f"--documents {number}: {index.prefix} has {index.documents:,} documents, 0 to "
            f"{index.documents - 1}"
        )
    first, last = index.document_indices[position], index.document_indices[position + 1]
    tokens, size = index.read_tokens(), index.dtype.itemsize
    ids: list[int] = []
    for sequence in range(first, last):
        at = int(index.pointers[sequence]) // size
        ids += tokens[at : at + int(index.lengths[sequence])].tolist()
    shown = ids[:most]
    cut = f", the first {most:,} shown" if len(ids) > most else ""
    heading = f"--- {index.prefix} document {position:,}: {len(ids):,} tokens{cut}"
    if tokenizer is None:
        return f"{heading}\n{' '.join(map(str, shown))}"
    known = [token for token in shown if 0 <= token < tokenizer.vocab_size]
    if len(known) < len(shown):
        heading += f", {len(shown) - len(known):,} of them outside the vocabulary"
    if ids and 0 <= ids[-1] < tokenizer.vocab_size:
        heading += f", ends with {tokenizer.piece(ids[-1])}"
    return f"{heading}\n{tokenizer.decode(known)}"


if __name__ == "__main__":
    sys.exit(main())
