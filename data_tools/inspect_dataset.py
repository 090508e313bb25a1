"""Inspect indexed datasets: statistics, documents as text, and verification.

``--run`` inspects the training data of a run: ``lineage/``.
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

from data_tools.common import ToolParser, run_tool
from data_tools.document_sources.lookup import SourceLookup, format_origin
from data_tools.documents import document_chunks, read_dataset_manifest
from data_tools.lineage import report as lineage_report
from data_tools.statistics import program as summary_program
from data_tools.statistics.counts import HISTOGRAM_BINS, document_lengths, length_histogram
from data_tools.statistics.tables import draw_histogram
from data_tools.tables import format_rows
from data_tools.tokenizer_flags import add_tokenizer_flags, tokenizer_from_args
from data_tools.verify_dataset import verify_dataset
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.data.indexed_dataset import DatasetIndex, read_and_check_index
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, DataError, UserError
from megatron_llmjp.tokenizers import Tokenizer

EXAMPLES = """\
  Print statistics and a histogram of document lengths, and save the histogram as a PNG file:
    inspect_dataset data/ja_text_document --png lengths.png

  Print the first, the eighth and the last document as text:
    inspect_dataset data/ja_text_document --documents 0 7 -1 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model

  Summarize all datasets in a folder by dataset, language and source file, and write a data card:
    inspect_dataset --summary data/ --report card.md --report card.html --report sizes.csv

  Verify datasets (exit code 1 if one is damaged):
    inspect_dataset --verify data/*.idx

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    examples = EXAMPLES + lineage_report.EXAMPLES
    parser = ToolParser(
        "inspect_dataset",
        "Inspect .bin/.idx token datasets and the training data of runs.",
        examples,
    )
    add = parser.add_argument
    add("prefixes", nargs="*", metavar="PREFIX", help="path without .bin or .idx (or with)")
    add(
        "--verify",
        action="store_true",
        help="read and check the whole dataset; token ids are checked against --vocab-size",
    )
    add(
        "--documents",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="print these documents; -1 is the last",
    )
    add(
        "--max-tokens",
        type=positive_int,
        default=200,
        metavar="N",
        help="number of tokens printed per document",
    )
    add_tokenizer_flags(add, required=False, use="prints text instead of ids: ")
    add("--png", type=Path, metavar="FILE", help="write the histogram to a PNG file")
    add("--json", action="store_true", help="print statistics as JSON")
    summary_program.add_flags(parser.add_argument)
    lineage_report.add_flags(parser.add_argument_group("training data of a run").add_argument)
    args = parser.parse(argv)
    if args.run is not None:
        return run_tool("inspect_dataset", lambda: lineage_report.report_lineage(args))
    if not args.prefixes:
        parser.error("expected datasets or --run FOLDER")
    if args.summary:
        for flag in ("verify", "documents", "png", "tokenizer_type"):
            if getattr(args, flag):
                parser.error(f"--{flag.replace('_', '-')} and --summary are mutually exclusive")
        return run_tool("inspect_dataset", lambda: summary_program.print_summary(args))
    if args.report:
        parser.error("--report requires --summary")
    return run_tool("inspect_dataset", lambda: run_inspection(args))


def run_inspection(args: argparse.Namespace) -> int:
    """Run the requested action for each dataset."""
    prefixes = [word.removesuffix(".idx").removesuffix(".bin") for word in args.prefixes]
    if args.verify:
        return verify_all(prefixes, args.vocab_size)
    tokenizer = None
    if args.tokenizer_type:
        tokenizer = tokenizer_from_args(args)
    indexes = [read_and_check_index(prefix) for prefix in prefixes]
    if args.documents:
        for index in indexes:
            for number in args.documents:
                print(show_document(index, number, tokenizer, args.max_tokens))
        return EXIT_DONE
    found = [dataset_statistics(index) for index in indexes]
    if args.json:
        print(json.dumps([stats | {"histogram": h.tolist()} for stats, h in found], indent=1))
    else:
        print(format_rows([stats for stats, _ in found]))
        for index, (_, histogram) in zip(indexes, found, strict=True):
            print(f"\n{index.prefix}: documents by length in tokens")
            print(draw_histogram(histogram.tolist()))
    if args.png:
        write_png(args.png, {str(i.prefix): h for i, (_, h) in zip(indexes, found, strict=True)})
    return EXIT_DONE


def verify_all(prefixes: list[str], vocab_size: int | None) -> int:
    """Verify each dataset, print the results and return the exit code."""
    code = EXIT_DONE
    for prefix in prefixes:
        try:
            checked, wrong = verify_dataset(prefix, vocab_size)
        except (DataError, UserError) as error:
            checked, wrong = [], [str(error)]
        print(f"{prefix}: {'DAMAGED' if wrong else 'ok'} ({'; '.join(checked)})")
        for finding in wrong:
            print(f"  {finding}")
            code = EXIT_FAILURE
    return code


def dataset_statistics(index: DatasetIndex) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Return a table row and a histogram: the documents with 0, 1, 2-3, 4-7 ... tokens."""
    sizes = [document_lengths(chunk.lengths, chunk.sequences) for chunk in document_chunks(index)]
    counted = length_histogram(np.concatenate(sizes) if sizes else np.zeros(0, np.int64))
    histogram = np.pad(counted, (0, HISTOGRAM_BINS - len(counted)))
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
        "manifest": "yes" if read_dataset_manifest(index.prefix) else "no",
    }
    return row, histogram


def write_png(path: Path, histograms: dict[str, npt.NDArray[np.int64]]) -> None:
    """Draw the histograms into one figure."""
    from matplotlib.figure import Figure  # imported late: takes half a second

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


def show_document(
    index: DatasetIndex, number: int, tokenizer: Tokenizer | None, max_tokens: int
) -> str:
    """Return one document with a heading; long documents are truncated.

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
    shown = ids[:max_tokens]
    cut = f", the first {max_tokens:,} shown" if len(ids) > max_tokens else ""
    heading = f"--- {index.prefix} document {position:,}: {len(ids):,} tokens{cut}"
    origin = SourceLookup().origin(str(index.prefix), position)
    source = "" if origin is None else f"\nsource: {format_origin(origin)}"
    if tokenizer is None:
        return f"{heading}{source}\n{' '.join(map(str, shown))}"
    known = [token for token in shown if 0 <= token < tokenizer.vocab_size]
    if len(known) < len(shown):
        heading += f", {len(shown) - len(known):,} of them outside the vocabulary"
    if ids and 0 <= ids[-1] < tokenizer.vocab_size:
        heading += f", ends with {tokenizer.piece(ids[-1])}"
    return f"{heading}{source}\n{tokenizer.decode(known)}"


if __name__ == "__main__":
    sys.exit(main())
