"""Split a tokenized dataset into disjoint folds that share its .bin, without copying tokens.

An additional ``refined`` part takes the best documents, by a list of numbers or by scores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.common import ToolParser, run_tool
from data_tools.document_sources.merging import open_sources, write_selected
from data_tools.document_sources.sources_file import SUFFIX
from data_tools.documents import MANIFEST_FORMAT, read_dataset_manifest
from data_tools.tables import format_rows
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.data.indexed_dataset import DatasetIndex, bin_path, read_and_check_index
from megatron_llmjp.data.indexed_dataset_writer import write_idx
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.filesystem import (
    refuse_existing,
    rename_into_place,
    staging_folder,
    write_json_durably,
)

EXAMPLES = """\
  Split into ten folds after holding out 1,000 documents for validation:
    split_folds --input data/ja_text_document --output-dir data/folds --folds 10 \\
        --validation-documents 1000
  writes data/folds/fold00/ja_text_document.{bin,idx,json} ... fold09, validation. Each .bin is a
  link to that of the input; only the .idx differs, so every Megatron reader accepts them.

  Select better documents for a last fold, by a score per document:
    split_folds ... --refined-scores scores.txt --refined-share 0.1
  or by document numbers (0 is the first), one per line:
    split_folds ... --refined-list numbers.txt

  Folds are not suitable for readers that partition a .bin without using the index."""


def read_selection(args: argparse.Namespace, documents: int) -> npt.NDArray[Any] | None:
    """Return the selected document numbers in ascending order, or None without a selection.

    Raises:
        UserError: both a list and scores are given, or a file does not match the dataset.
    """
    if args.refined_list and args.refined_scores:
        raise UserError("--refined-list and --refined-scores are mutually exclusive")
    if args.refined_list:
        numbers = _numbers(args.refined_list).astype(np.int64)
        for wrong in numbers[(numbers < 0) | (numbers >= documents)][:1]:
            raise UserError(
                f"--refined-list {args.refined_list}: document {wrong} is outside 0 to "
                f"{documents - 1}"
            )
        return np.unique(numbers)
    if args.refined_scores:
        scores = _numbers(args.refined_scores)
        if len(scores) != documents:
            raise UserError(
                f"--refined-scores {args.refined_scores}: {len(scores):,} scores for "
                f"{documents:,} documents; expected one score per line, in document order"
            )
        best = max(1, round(documents * args.refined_share))
        return np.sort(np.argsort(-scores, kind="stable")[:best])
    return None


def _numbers(path: Path) -> npt.NDArray[np.float64]:
    try:
        with path.open(encoding="utf-8") as file:
            return np.array([float(line) for line in file if line.strip()])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except ValueError as error:
        raise UserError(f"{path}: expected one number per line ({error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "split_folds", "Split .bin/.idx datasets into disjoint folds without copying.", EXAMPLES
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="datasets, each split separately",
    )
    add(
        "--output-dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="output folder, with one subfolder per fold",
    )
    add("--folds", type=positive_int, required=True, metavar="N", help="number of folds")
    add("--seed", type=int, default=1234, help="seed of the random assignment")
    add(
        "--validation-documents",
        type=int,
        default=0,
        metavar="N",
        help="documents held out for validation",
    )
    add("--refined-list", type=Path, metavar="FILE", help="file of document numbers, one per line")
    add("--refined-scores", type=Path, metavar="FILE", help="file of document scores, one per line")
    add(
        "--refined-share",
        type=float,
        default=0.1,
        metavar="X",
        help="share of documents taken by score",
    )
    add("--link", choices=("hard", "symbolic"), default="hard", help="how folds share the .bin")
    add("--overwrite", action="store_true", help="replace existing folds")
    args = parser.parse(argv)
    return run_tool("split_folds", lambda: split(args))


def split(args: argparse.Namespace) -> int:
    """Split and verify every input, and print the table."""
    if len({Path(prefix).name for prefix in args.input}) < len(args.input):
        raise UserError("--input: two datasets of the same name would be written to the same files")
    table = [row for prefix in args.input for row in split_one(prefix, args)]
    print(format_rows(table))
    return EXIT_DONE


def split_one(prefix: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Split one dataset and return a table row per part."""
    index = read_and_check_index(prefix)
    parts = assign_documents(index.documents, args.folds, args.validation_documents, args.seed)
    refined = read_selection(args, index.documents)
    if refined is not None:
        parts["refined"] = np.setdiff1d(refined, parts.get("validation", refined[:0]))
    name = Path(prefix).name
    finals = {part: args.output_dir / part / name for part in parts}
    sources = open_sources(prefix, index.documents)
    suffixes = (".bin", SUFFIX, ".json", ".idx")
    paths = [Path(f"{final}{suffix}") for final in finals.values() for suffix in suffixes]
    refuse_existing(paths, args.overwrite)
    table = []
    with staging_folder(args.output_dir / f".{name}.partial") as folder:
        pairs = []
        for part, documents in parts.items():
            row, crc = write_part(index, documents, folder / part, args.link)
            manifest = part_manifest(prefix, index, row, crc, part, args)
            if sources is not None:
                manifest |= write_selected(sources, documents, folder / f"{part}{SUFFIX}")
            write_json_durably(folder / f"{part}.json", manifest)
            table.append({"dataset": name, "part": part, **row})
            finals[part].parent.mkdir(parents=True, exist_ok=True)
            pairs += [(folder / f"{part}{s}", Path(f"{finals[part]}{s}")) for s in suffixes]
        verify_parts(index, {part: folder / part for part in parts if part != "refined"})
        for _, final in pairs:
            if sources is None and final.suffix == SUFFIX:
                final.unlink(missing_ok=True)
        pairs = [(work, final) for work, final in pairs if final.suffix != SUFFIX or sources]
        rename_into_place(sorted(pairs, key=lambda pair: pair[1].suffix == ".idx"))
    return table


def assign_documents(
    documents: int, folds: int, validation: int, seed: int
) -> dict[str, npt.NDArray[Any]]:
    """Assign documents to folds at random, in equal numbers to within one document.

    Raises:
        UserError: there are fewer documents than parts.
    """
    if validation < 0 or documents - validation < folds or folds > 65000:
        raise UserError(
            f"{documents:,} documents cannot be split into {folds:,} folds and {validation:,} "
            "validation documents: reduce --folds or --validation-documents"
        )
    part_of_document = np.arange(documents - validation, dtype=np.int64) % folds
    part_of_document = np.concatenate([part_of_document, np.full(validation, folds)]).astype(
        np.uint16
    )
    # RandomState, as in megatron-core: numpy guarantees that its random stream never changes.
    np.random.RandomState(seed).shuffle(part_of_document)
    width = max(2, len(str(folds - 1)))
    parts = {
        f"fold{fold:0{width}}": np.flatnonzero(part_of_document == fold) for fold in range(folds)
    }
    if validation:
        parts["validation"] = np.flatnonzero(part_of_document == folds)
    return parts


def write_part(
    index: DatasetIndex, documents: npt.NDArray[Any], path: Path, link: str
) -> tuple[dict[str, int], int]:
    """Write the .idx of one part and link its .bin; return the counts and the CRC-32."""
    first, last = index.document_indices[:-1][documents], index.document_indices[1:][documents]
    counts = (last - first).astype(np.int32)
    # Sequence numbers of these documents: a running count plus an offset per document.
    before = np.repeat(first - (np.cumsum(counts, dtype=np.int64) - counts), counts)
    sequences = before + np.arange(len(before))
    lengths = index.lengths[sequences]
    crc = write_idx(
        path.with_suffix(".idx"), index.dtype, lengths, counts, index.pointers[sequences]
    )
    _link(bin_path(index.prefix), path.with_suffix(".bin"), link)
    return {"documents": len(documents), "tokens": int(lengths.sum(dtype=np.int64))}, crc


def _link(source: Path, target: Path, link: str) -> None:
    real = source.resolve()
    if link == "symbolic":
        target.symlink_to(real)
        return
    try:
        os.link(real, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot create a hard link to {real} ({error.strerror}); they may be on "
            "different file systems. Give --link symbolic."
        ) from error


def part_manifest(
    prefix: str,
    index: DatasetIndex,
    row: dict[str, int],
    crc: int,
    part: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return the manifest of a part, which describes its own .idx and the shared .bin."""
    whole = read_dataset_manifest(prefix) or {}
    binary = whole.get("bin", {"bytes": bin_path(prefix).stat().st_size})
    return {
        "format": MANIFEST_FORMAT,
        "dtype": index.dtype.name,
        **row,
        "bin": {**binary, "shared": True},
        "idx": {"crc32": f"{crc:08x}"},
        "recipe": whole.get("recipe", {}),
        "split": {
            "source": prefix,
            "part": part,
            "folds": args.folds,
            "seed": args.seed,
            "validation_documents": args.validation_documents,
        },
    }


def verify_parts(index: DatasetIndex, parts: dict[str, Path]) -> None:
    """Read the parts back and check that they contain every sequence exactly once.

    Raises:
        RuntimeError: they do not, which is an error of this program.
    """
    seen = index.lengths == 0  # empty sequences have no tokens in the .bin
    documents = 0
    for path in parts.values():
        part = read_and_check_index(path)
        documents += part.documents
        filled = part.lengths > 0
        # side="right" minus one skips empty sequences, which have the pointer of the next one
        order = np.searchsorted(index.pointers, part.pointers[filled], side="right") - 1
        if seen[order].any() or not np.array_equal(index.lengths[order], part.lengths[filled]):
            raise RuntimeError(f"{path}: contains a sequence that is also in another part")
        seen[order] = True
    if documents != index.documents or not seen.all():
        raise RuntimeError(
            f"{index.prefix}: the parts contain {documents} documents, expected {index.documents}"
        )


if __name__ == "__main__":
    sys.exit(main())
