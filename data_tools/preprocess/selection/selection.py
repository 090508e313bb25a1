"""Which documents of the input a job writes, and in which order."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.selection.document_hooks import DocumentHooks, add_hook_flags, load_hooks
from data_tools.preprocess.selection.document_records import (
    MAX_FILES,
    OFFSET_BITS,
    Arrangement,
    add_arrangement_flags,
)
from data_tools.preprocess.selection.removal import (
    LengthLimits,
    add_limit_flags,
    length_limits,
    removal_reasons,
)
from megatron_llmjp.errors import UserError

OPTION_NAMES = (
    "hooks",
    *(item.name for item in fields(LengthLimits)),
    *(item.name for item in fields(Arrangement)),
)
"""Names of the options in :meth:`Selection.identity`."""


@dataclass(frozen=True)
class Selection:
    """Hooks, limits and order of the documents of a job.

    Attributes:
        hooks: functions that select and change documents.
        lengths: limits on the length of documents.
        arrangement: order of the documents, and whether duplicates are removed.
        file_numbers: number of each file in the list of all files of an array, by name.
    """

    hooks: DocumentHooks | None
    lengths: LengthLimits
    arrangement: Arrangement
    file_numbers: Mapping[str, int]

    def identity(self) -> dict[str, Any]:
        """Return what is set, as recorded in the journal and the manifest."""
        hooks = {} if self.hooks is None else {"hooks": {"sha256": self.hooks.digest}}
        return {**hooks, **self.lengths.identity(), **self.arrangement.identity()}

    def removal_reasons(self) -> list[str]:
        """Return the reasons for which documents may be removed."""
        filters = self.hooks is not None and self.hooks.keep is not None
        return removal_reasons(self.lengths, filters, self.arrangement.remove_duplicates)


def add_selection_flags(add: Callable[..., Any]) -> None:
    """Add the flags on the selection and order of documents."""
    add_hook_flags(add)
    add_limit_flags(add)
    add_arrangement_flags(add)


def selection_from_args(args: argparse.Namespace, sources: Sequence[InputSource]) -> Selection:
    """Load the hooks and check the flags.

    Args:
        args: the parsed flags.
        sources: all sources, before they are divided between the tasks of an array.

    Raises:
        UserError: the hooks are invalid, limits contradict each other, or there are too many or too
            large files for the positions of documents.
    """
    hooks = None if args.hooks is None else load_hooks(args.hooks)
    arrangement = Arrangement(args.shuffle_seed, args.remove_duplicates)
    if arrangement.is_needed and len(sources) > MAX_FILES:
        raise UserError(
            f"--shuffle-seed and --remove-duplicates: {len(sources):,} input files, at most "
            f"{MAX_FILES:,} are supported; join small files"
        )
    large = [source for source in sources if source.size >= 1 << OFFSET_BITS]
    if arrangement.is_needed and large:
        raise UserError(
            f"--shuffle-seed and --remove-duplicates: {large[0].name} has {large[0].size:,} bytes, "
            f"at most {1 << OFFSET_BITS:,} are supported; divide it"
        )
    numbers = {source.name: number for number, source in enumerate(sources)}
    return Selection(hooks, length_limits(args), arrangement, numbers)
