"""Concatenate indexed datasets in constant memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.common import ToolParser, run_tool
from data_tools.document_sources import sources_file
from data_tools.document_sources.merging import MergedSources
from data_tools.documents import (
    MANIFEST_FORMAT,
    chunks_with_tokens,
    document_chunks,
    read_dataset_manifest,
)
from data_tools.preprocess.arrangement.merge_parts import read_array_parts
from data_tools.preprocess.array.counts import describe_parts, table_of, without_removed
from data_tools.preprocess.array.parts import array_folder
from data_tools.preprocess.array.shards import find_parts
from data_tools.preprocess.input.remote.addresses import refuse_remote_output
from data_tools.preprocess.job.work_folder import WorkFolder
from data_tools.statistics.counts import (
    CountsByLanguage,
    add_by_source,
    describe_sources,
    read_sources,
)
from data_tools.statistics.removed import (
    RemovedBySource,
    add_removed_by_source,
    describe_removed,
    read_removed,
)
from data_tools.tables import format_rows
from megatron_llmjp.data.indexed_dataset import DatasetIndex, bin_path, read_and_check_index
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.filesystem import (
    refuse_existing,
    rename_into_place,
    staging_folder,
    write_json_durably,
)
from megatron_llmjp.tokenizers.registry import identity_key

EXAMPLES = """\
  Merge all datasets of a folder, in the order of their names (as Megatron-LM's merge_datasets.py):
    merge_datasets --input parts/ --output-prefix data/ja_text_document

  Merge datasets in the given order:
    merge_datasets --input data/wiki_text_document data/cc_text_document --output-prefix data/all

  Merge the parts written by preprocess_data --output-prefix data/ja --shard slurm/16 without
  --finish-array; missing parts are reported, and a table of all files is printed:
    merge_datasets --parts data/ja"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser("merge_datasets", "Concatenate .bin/.idx datasets.", EXAMPLES)
    add = parser.add_argument
    add("--input", nargs="+", metavar="PATH", help="folders or prefixes")
    add("--output-prefix", metavar="PREFIX", help="output is PREFIX.{bin,idx,json}")
    add("--parts", metavar="PREFIX", help="merge all parts written by preprocess_data --shard")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    add("--allow-empty", action="store_true", help="write a dataset without tokens")
    args = parser.parse(argv)
    if bool(args.parts) == bool(args.input and args.output_prefix):
        parser.error("expected --input and --output-prefix, or --parts")
    return run_tool("merge_datasets", lambda: merge_requested(args))


def merge_requested(args: argparse.Namespace) -> int:
    """Merge the given datasets, or the parts of each key."""
    refuse_remote_output("--output-prefix", args.output_prefix or "")
    if not args.parts:
        merge_datasets(
            find_prefixes(args.input), args.output_prefix, args.overwrite, args.allow_empty
        )
        return EXIT_DONE
    parts = find_parts(args.parts)
    held = WorkFolder(array_folder(args.parts))
    try:
        _merge_parts(args, parts, held)
    finally:
        held.release()
    return EXIT_DONE


def _merge_parts(
    args: argparse.Namespace, parts: Mapping[str, list[str]], held: WorkFolder
) -> None:
    """Merge the parts of each key, and print the table of all files."""
    manifests = {}
    for key, prefixes in parts.items():
        output = f"{args.parts}_{key}_document"
        described = describe_parts(key, prefixes)
        merge_datasets(
            prefixes, output, args.overwrite, args.allow_empty, True, described, held.check
        )
        if described:
            manifests[key] = read_dataset_manifest(output) or {}
    held.remove()
    if manifests:
        print(format_rows(table_of(manifests)))


def merge_datasets(
    prefixes: list[str],
    output_prefix: str,
    overwrite: bool,
    allow_empty: bool = False,
    is_array: bool = False,
    described: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Check that the datasets are compatible, and merge them.

    Args:
        prefixes: the datasets.
        output_prefix: the merged dataset.
        overwrite: replace an existing dataset.
        allow_empty: write a dataset without tokens.
        is_array: these are all parts of an array; their documents may be shuffled together.
        described: more entries of its manifest.
        check: called before the files get their final names; may raise an error.
    """
    suffixes = (".bin", sources_file.SUFFIX, ".json", ".idx")
    finals = [Path(output_prefix + suffix) for suffix in suffixes]
    if output_prefix in prefixes:
        raise UserError(f"--output-prefix {output_prefix}: the output is one of the inputs")
    refuse_existing(finals, overwrite)
    indexes = [read_and_check_index(prefix) for prefix in prefixes]
    for prefix, index in zip(prefixes, indexes, strict=True):
        if index.dtype != indexes[0].dtype:
            raise UserError(
                f"{prefix}: tokens are {index.dtype}, but those of {prefixes[0]} are "
                f"{indexes[0].dtype}: the vocabularies differ."
            )
    if not allow_empty and not any(bin_path(prefix).stat().st_size for prefix in prefixes):
        raise UserError(
            f"--output-prefix {output_prefix}: all {len(prefixes):,} datasets are without tokens. "
            "Check them with inspect_dataset, or give --allow-empty to write an empty dataset."
        )
    recipe = common_recipe(prefixes)
    array = read_array_parts(prefixes, indexes) if is_array else None
    with staging_folder(Path(f"{output_prefix}.partial")) as folder:
        writer = IndexedDatasetWriter(folder / "merged.bin", indexes[0].dtype)
        documents = [index.documents for index in indexes]
        sources = MergedSources(prefixes, documents, is_array, folder)
        if array is None:
            _concatenate(indexes, writer)
            sources.concatenate()
        else:
            array.write(writer, sources, folder)
        statistics = merged_statistics(prefixes) if array is None else array.statistics()
        crc = writer.finish(folder / "merged.idx")
        manifest = merged_manifest(writer, crc, recipe, prefixes, statistics)
        write_json_durably(
            folder / "merged.json",
            manifest | sources.finish() | without_removed(described or {}, statistics),
        )
        check()
        made = [(folder / f"merged{final.suffix}", final) for final in finals]
        Path(output_prefix + sources_file.SUFFIX).unlink(missing_ok=True)
        rename_into_place([(work, final) for work, final in made if work.exists()])
    position = writer.position
    tokens_written = position.bin_bytes // writer.dtype.itemsize
    print(
        f"{output_prefix}: {len(prefixes):,} datasets, {position.documents:,} documents, "
        f"{tokens_written:,} tokens"
    )


def _concatenate(indexes: Sequence[DatasetIndex], writer: IndexedDatasetWriter) -> None:
    """Write the documents of all datasets in order."""
    for index in indexes:
        for chunk in document_chunks(index):
            for tokens, part in chunks_with_tokens(index, chunk):
                writer.add(tokens, part.lengths, part.sequences)


def find_prefixes(words: Sequence[str]) -> list[str]:
    """Expand folders to the dataset prefixes in them, sorted by name.

    Raises:
        UserError: a folder contains no dataset files.
    """
    prefixes: list[str] = []
    for word in words:
        folder = Path(word)
        if not folder.is_dir():
            prefixes.append(word)
            continue
        stems = {p.with_suffix("") for p in folder.iterdir() if p.suffix in (".bin", ".idx")}
        if not stems:
            raise UserError(f"--input {word}: the folder contains no .bin or .idx files")
        prefixes += map(str, sorted(stems))
    return prefixes


def common_recipe(prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the tokenizer and options common to all parts that have a manifest.

    ``encoders``, the libraries that encoded, are those of any part, sorted.

    Raises:
        UserError: two parts were tokenized with different tokenizers or options.
    """
    first: dict[str, Any] = {}
    named = ""
    encoders: set[str] = set()
    for prefix in prefixes:
        recipe = (read_dataset_manifest(prefix) or {}).get("recipe", {})
        encoders |= set(recipe.get("encoders") or [])
        ours = {name: recipe[name] for name in ("tokenizer", "options") if name in recipe}
        ends = _added_tokens(ours)
        if first and ours:
            if identity_key(ours.get("tokenizer", {})) != identity_key(
                first.get("tokenizer", {})
            ) or ends != _added_tokens(first):
                raise UserError(
                    f"{prefix}: was tokenized with another tokenizer, --append-eod or --append-bos "
                    f"than {named}:\n"
                    f"  {ours}\n  {first}"
                )
        elif ours:
            first, named = ours, prefix
    return first | {"encoders": sorted(encoders)} if encoders else first


def _added_tokens(recipe: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether EOD and BOS tokens were added to each document."""
    options = recipe.get("options", {})
    return bool(options.get("append_eod")), bool(options.get("append_bos"))


def merged_manifest(
    writer: IndexedDatasetWriter,
    idx_crc: int,
    recipe: dict[str, Any],
    prefixes: Sequence[str],
    statistics: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the manifest of the merged dataset."""
    manifest = {
        "format": MANIFEST_FORMAT,
        **writer.describe(idx_crc),
        "recipe": recipe,
        "merged": list(prefixes),
    }
    return manifest if statistics is None else manifest | {"statistics": statistics}


def merged_statistics(prefixes: Sequence[str]) -> dict[str, Any] | None:
    """Return the counts by source file and language of all parts; None if one has none."""
    total: dict[str, CountsByLanguage] = {}
    removed: RemovedBySource = {}
    for prefix in prefixes:
        try:
            statistics = (read_dataset_manifest(prefix) or {})["statistics"]
            add_by_source(total, read_sources(statistics))
            add_removed_by_source(removed, read_removed(statistics))
        except (KeyError, ValueError):
            return None
    return {**describe_sources(total), **describe_removed(removed)}


if __name__ == "__main__":
    sys.exit(main())
