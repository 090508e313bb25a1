"""Flags for averages, adapters, chat templates and followed runs, and the start of ``--follow``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import folder_name
from megatron_llmjp.checkpoint.save_folder import NATIVE
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.errors import EXIT_DONE, UserError

DEFAULT_POLL_SECONDS = 60.0


def add_derived_sources(add: Callable[..., Any]) -> None:
    """Add the flags that change what is converted: averages, adapters, templates, runs."""
    add(
        "--average",
        nargs="+",
        default=[],
        metavar="DIR",
        help="convert the mean of these checkpoints: folders, or folders or iterations below "
        "--input; weights only",
    )
    add(
        "--ema-decay",
        type=_decay,
        metavar="X",
        help="for --average: exponential moving average in the order of the iterations, "
        "a_k = X a_(k-1) + (1 - X) x_k",
    )
    add(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="merge a LoRA adapter, as written by peft's save_pretrained, into the weights",
    )
    stored = " or ".join(name for name, entry in FORMATS.items() if entry.stores_tokenizer)
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help=f"to {stored}: Jinja template of conversations, stored with the tokenizer instead of "
        "the source's own",
    )
    _add_follow_flags(add)


def _add_follow_flags(add: Callable[..., Any]) -> None:
    add(
        "--follow",
        type=Path,
        metavar="SAVE",
        help="convert each checkpoint of a run to OUTPUT/iter_*, until the run is finished; "
        "checkpoints that were converted before are not repeated",
    )
    add(
        "--command",
        metavar="COMMAND",
        help="for --follow: shell command for each converted checkpoint, with its folder in "
        "$CHECKPOINT and its iteration in $ITERATION; a failed one is repeated by the next start",
    )
    add(
        "--poll-seconds",
        type=_seconds,
        metavar="SECONDS",
        help=f"for --follow: time between looks at SAVE (default: {DEFAULT_POLL_SECONDS:g})",
    )
    add(
        "--stop-on-error",
        action="store_true",
        help="for --follow: end with exit code 1 when a conversion or a command fails",
    )


def _decay(text: str) -> float:
    return _between(text, 1.0, "a number between 0 and 1")


def _seconds(text: str) -> float:
    return _between(text, 1e6, "a positive number of seconds")


def _between(text: str, limit: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < limit:
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return value


def check_sources(arguments: argparse.Namespace) -> None:
    """Check that the flags name one source, and fit together.

    Raises:
        UserError: they do not.
    """
    if arguments.follow is not None:
        _check_follow(arguments)
        return
    for name in ("command", "poll_seconds", "stop_on_error"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} requires --follow")
    if arguments.input is None and not arguments.average:
        raise UserError("--input DIR, --average DIR DIR... or --follow SAVE is required")
    if arguments.ema_decay is not None and not arguments.average:
        raise UserError("--ema-decay requires --average")
    if arguments.average or arguments.adapter:
        flag = "--average" if arguments.average else "--adapter"
        if arguments.verify:
            raise UserError(f"--verify compares with one source; it is not possible with {flag}")
        if arguments.shard is not None:
            raise UserError(f"--shard divides one source over tasks, not the result of {flag}")


def _check_follow(arguments: argparse.Namespace) -> None:
    excluded = {
        "--input": arguments.input is not None,
        "--average": bool(arguments.average),
        "--ema-decay": arguments.ema_decay is not None,
        "--dry-run": arguments.dry_run,
        "--shard": arguments.shard is not None,
        f"--from {arguments.source}": arguments.source not in (None, NATIVE),
    }
    for flag, is_given in excluded.items():
        if is_given:
            raise UserError(f"{flag} cannot be combined with --follow")


def averaged_folders(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """Return the folders of ``--average``.

    Raises:
        UserError: one does not exist.
    """
    return tuple(_averaged_folder(word, arguments.input) for word in arguments.average)


def _averaged_folder(word: str, run: Path | None) -> Path:
    names = [Path(word)]
    if run is not None:
        iteration = [run / folder_name(int(word))] if word.isdecimal() else []
        names = [*iteration, run / word, *names]
    found = next((path for path in names if path.is_dir()), None)
    if found is None:
        shown = " or ".join(str(path) for path in names)
        raise UserError(f"--average {word}: {shown} does not exist")
    return found


def follow_run(arguments: argparse.Namespace, convert: Callable[[Path, Path], int]) -> int:
    """Follow a run, and return the exit code.

    Args:
        arguments: the command line.
        convert: converts a checkpoint to a folder and returns the exit code.
    """
    from megatron_llmjp.convert.follow.follow import FollowSettings, follow

    def convert_or_raise(path: Path, output: Path) -> None:
        if convert(path, output) != EXIT_DONE:
            raise UserError("--verify found a difference")

    settings = FollowSettings(
        arguments.follow,
        arguments.output,
        arguments.target,
        arguments.command,
        arguments.poll_seconds or DEFAULT_POLL_SECONDS,
        arguments.stop_on_error,
    )
    return follow(settings, convert_or_raise)
