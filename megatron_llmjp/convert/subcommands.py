"""The commands ``convert_checkpoint inspect`` and ``convert_checkpoint extract-adapter``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llmjp.arguments import CommandLineParser, positive_int
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, UserError

if TYPE_CHECKING:
    from megatron_llmjp.convert.formats.base import SourceCheckpoint

INSPECT_HELP = """\
Describe the checkpoint in a folder, and list the formats to convert it to. With two
folders, compare their weights bit by bit, in any two formats and parallel layouts."""

INSPECT_EXAMPLES = """\
examples:
  convert_checkpoint inspect checkpoints
  convert_checkpoint inspect checkpoints/iter_0001000 model-hf --json

Exit codes of a comparison: 0 equal, 1 different, 2 invalid arguments or checkpoint.
Architectures are compared, too. Optimizer state, tokenizers, and padding rows of the
vocabulary that only one checkpoint has are not.
"""

EXTRACT_HELP = """\
Write the difference of two checkpoints as a LoRA adapter for peft, and print its error.
Linear layers get the best matrices of the given rank; embeddings, output layer and norms
that differ are stored whole (modules_to_save)."""

EXTRACT_EXAMPLES = """\
example:
  convert_checkpoint extract-adapter model-hf tuned/iter_0000500 --rank 16 --output adapter
"""


def add_ignored_args(add: Callable[..., Any]) -> None:
    """Add ``--ignore-args``."""
    names = " or ".join(name for name, entry in FORMATS.items() if entry.has_megatron_args)
    add(
        "--ignore-args",
        type=lambda text: frozenset(text.split(",")),
        default=frozenset(),
        metavar="NAME,...",
        help=f"from {names}: arguments of the run to ignore because they do not change the network",
    )


def inspect(words: list[str]) -> int:
    """Describe a checkpoint or compare two, and return the exit code."""
    parser = CommandLineParser(
        prog="convert_checkpoint inspect", description=INSPECT_HELP, epilog=INSPECT_EXAMPLES
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="checkpoint, or folder of a run")
    add("other", type=Path, nargs="?", metavar="DIR", help="checkpoint to compare it with")
    add("--json", action="store_true", help="with two checkpoints: print a JSON object")
    add_ignored_args(add)
    arguments = parser.parse(words)
    if arguments.other is not None:
        return _compare(arguments.folder, arguments.other, arguments.json, arguments.ignore_args)
    if arguments.json:
        raise UserError("--json requires two checkpoints")
    from megatron_llmjp.convert.inspection import describe_checkpoint

    print(describe_checkpoint(arguments.folder, arguments.ignore_args))
    return EXIT_DONE


def _compare(first: Path, second: Path, as_json: bool, ignored: frozenset[str]) -> int:
    from megatron_llmjp.convert.verification.comparison import (
        compare_checkpoints,
        format_comparison,
    )

    left, right = _open_pair(first, second, ignored)
    progress = _progress_bar(left, right)
    found = compare_checkpoints(left, right, progress.add)
    progress.close()
    text = json.dumps(found.to_json(), indent=2) if as_json else format_comparison(found)
    print(text)
    return EXIT_DONE if found.is_equal else EXIT_FAILURE


def _open_pair(
    first: Path, second: Path, ignored: frozenset[str] = frozenset()
) -> tuple[SourceCheckpoint, SourceCheckpoint]:
    from megatron_llmjp.convert.opening import open_any

    return open_any(first, ignored), open_any(second, ignored)


def _progress_bar(*sources: SourceCheckpoint) -> Any:
    from megatron_llmjp.convert.copying.progress_bar import ProgressBar
    from megatron_llmjp.convert.files.storage import byte_count

    reads = [read for source in sources for read in source.reads.values()]
    return ProgressBar(sum(byte_count(read.shape, read.dtype) for read in reads), False)


def extract_adapter(words: list[str]) -> int:
    """Write the difference of two checkpoints as an adapter, and return the exit code."""
    parser = CommandLineParser(
        prog="convert_checkpoint extract-adapter",
        description=EXTRACT_HELP,
        epilog=EXTRACT_EXAMPLES,
    )
    add = parser.add_argument
    add("base", type=Path, metavar="BASE", help="the base model, in any format")
    add("tuned", type=Path, metavar="TUNED", help="the model after tuning, in any format")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to create")
    add("--rank", type=positive_int, required=True, metavar="R", help="rank of the matrices")
    add(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="type of the adapter (default: fp32)",
    )
    add(
        "--linear-only",
        action="store_true",
        help="omit embeddings, output layer and norms; their difference is part of the error",
    )
    arguments = parser.parse(words)
    from megatron_llmjp.convert.files.storage import DTYPES
    from megatron_llmjp.convert.tuning import extract

    base, tuned = _open_pair(arguments.base, arguments.tuned)
    progress = _progress_bar(base)
    error = extract.extract_adapter(
        base,
        tuned,
        arguments.output,
        arguments.rank,
        DTYPES[arguments.dtype],
        arguments.linear_only,
        progress.add,
    )
    progress.close()
    if error.lost:
        shown = ", ".join(error.lost[:4]) + (", ..." if len(error.lost) > 4 else "")
        print(
            f"warning: {len(error.lost)} tensors differ that the adapter does not contain: {shown}",
            file=sys.stderr,
        )
    print(
        f"wrote {arguments.output}: rank {arguments.rank}; error {error.relative:.3g} of the "
        f"difference (Frobenius norm), at most {error.worst[0]:.3g} in {error.worst[1] or 'none'}"
    )
    return EXIT_DONE
