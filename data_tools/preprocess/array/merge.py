"""Merging of the parts of an array: one dataset per key, with the counts of one job."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.document_sources.sources_file import SUFFIX
from data_tools.documents import read_dataset_manifest
from data_tools.merge_datasets import merge_datasets
from data_tools.preprocess.array.counts import describe_parts, table_of
from data_tools.preprocess.array.parts import count_of_parts, find_keys
from data_tools.preprocess.array.shards import find_parts, part_prefix
from data_tools.tables import format_rows, write_table
from megatron_llmjp.errors import UserError


class ArrayOutput:
    """The merged datasets of an array."""

    def __init__(self, args: argparse.Namespace, count: int, digest: str) -> None:
        """Describe the output.

        Args:
            args: the command line.
            count: number of parts.
            digest: checksum of the division of the input.
        """
        self.prefix, self.keys, self._args = args.output_prefix, args.json_keys, args
        self.count = count
        self.array = {"count": count, "list": digest}

    def prefix_of(self, key: str) -> str:
        """Return the prefix of a key's dataset."""
        return f"{self.prefix}_{key}_document"

    def is_complete(self, recipe: dict[str, Any]) -> bool:
        """Return whether all keys are merged from parts of this array.

        Raises:
            UserError: a dataset with one of the names is something else.
        """
        merged = [self._is_merged(key, recipe) for key in self.keys]
        return all(merged)

    def _is_merged(self, key: str, recipe: dict[str, Any]) -> bool:
        prefix = self.prefix_of(key)
        existing = [s for s in (".bin", ".json", ".idx") if Path(prefix + s).exists()]
        if not existing or Path(f"{prefix}.partial").is_dir():  # a task was killed in between
            return False
        manifest = read_dataset_manifest(prefix) or {}
        recorded = {k: v for k, v in manifest.get("recipe", {}).items() if k != "encoders"}
        is_ours = manifest.get("array") == self.array and recorded == recipe
        if is_ours and len(existing) == 3:
            return True
        raise UserError(
            f"--output-prefix {self.prefix}: {prefix}{existing[-1]} already exists, but not as the "
            "merged output of this array. Choose another prefix, or remove it."
        )

    def refuse_other_parts(self, number: int, recipe: dict[str, Any]) -> None:
        """Check that a complete part belongs to this array.

        Raises:
            UserError: it was written with another input, tokenizer or other options.
        """
        prefix = part_prefix(self.prefix, number, self.count)
        found = find_keys(prefix)
        whole = recipe | {"shard": {"number": number} | self.array}
        for key in self.keys:
            recorded = found.get(key, {}).get("recipe", {})
            made = {k: v for k, v in recorded.items() if k not in ("sources", "encoders")}
            if made != whole:
                problem = (
                    "was written with another input, tokenizer or other options"
                    if key in found
                    else "is missing"
                )
                raise UserError(
                    f"{prefix}_{key}_document: {problem}. Choose another --output-prefix, or "
                    "remove the files of this part."
                )

    def refuse_other_arrays(self) -> None:
        """Raise UserError if there are parts of an array with another number of parts."""
        others = [count for count in count_of_parts(self.prefix) if count != self.count]
        if others:
            raise UserError(
                f"--output-prefix {self.prefix}: there are parts of an array of {others[0]} tasks, "
                f"{part_prefix(self.prefix, 0, others[0])} ... Give --shard NUMBER/{others[0]}, "
                "choose another prefix, or remove them."
            )

    def merge(self, recipe: dict[str, Any], check: Callable[[], None]) -> None:
        """Merge the parts of all keys that are not merged yet.

        ``check`` is called before files are renamed to their final names, and raises an error if
        another process merges.

        Raises:
            UserError: a part is missing or damaged, or an output exists.
        """
        parts = find_parts(self.prefix)
        for key in self.keys:
            if not self._is_merged(key, recipe):
                extra = describe_parts(key, parts[key])
                prefix = self.prefix_of(key)
                # What exists, if anything, was left by a task that was killed while renaming.
                merge_datasets(parts[key], prefix, True, self._args.allow_empty, True, extra, check)

    def print_table(self) -> None:
        """Print the counts of all parts as one table, and write the --report files."""
        manifests = {key: read_dataset_manifest(self.prefix_of(key)) or {} for key in self.keys}
        table = table_of(manifests)
        print(format_rows(table))
        for key in self.keys:
            more = f" {SUFFIX}" if self._args.record_sources else ""
            print(f"{self.prefix_of(key)}.bin .idx .json{more}")
        for path in self._args.report:
            write_table(path, table)
