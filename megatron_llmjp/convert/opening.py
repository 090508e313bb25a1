"""Opening of source checkpoints: one, the average of several, with an adapter merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_llmjp.convert.average import average_checkpoints
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.registry import FORMATS, check_is_folder, detect_format
from megatron_llmjp.convert.tuning.merge import merge_adapter
from megatron_llmjp.errors import UserError

_MALFORMED_INPUT_ERRORS = (
    *(AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError),
    *(RecursionError, MemoryError, OSError, RuntimeError),
)
"""Exceptions that readers raise on files with unexpected content."""

MAX_PROBLEM = 300
"""Characters of such an exception in a message."""


@contextmanager
def malformed_input(path: Path) -> Iterator[None]:
    """Convert the errors of readers on files with unexpected content to user errors."""
    try:
        yield
    except _MALFORMED_INPUT_ERRORS as error:
        problem = repr(error)[:MAX_PROBLEM]
        raise UserError(f"{path}: damaged, or not in a supported format ({problem})") from error


def open_checkpoint(name: str, path: Path, options: ConversionOptions) -> SourceCheckpoint:
    """Open a checkpoint of a format.

    Raises:
        UserError: the checkpoint is incomplete, or an option does not apply to it.
    """
    entry = FORMATS[name]
    if options.main_weights and not entry.has_main_weights:
        raise UserError(f"--main-weights: not supported for {name} checkpoints: {path}")
    if options.ignored_args and not entry.has_megatron_args:
        raise UserError(f"--ignore-args: not supported for {name} checkpoints: {path}")
    return entry.read(path, options)


def open_source(
    source_format: str | None, path: Path, options: ConversionOptions
) -> SourceCheckpoint:
    """Open the source: one checkpoint, or the average of several, with the adapter merged."""
    opened = [_open_checked(source_format, each, options) for each in options.average or (path,)]
    source = opened[0]
    if options.average:
        source = average_checkpoints(opened, options.ema_decay, options.dtype)
    if options.adapter is not None:
        with malformed_input(options.adapter):
            source = merge_adapter(source, options.adapter, options.dtype)
    return source


def _open_checked(
    source_format: str | None, path: Path, options: ConversionOptions
) -> SourceCheckpoint:
    check_is_folder(path)
    with malformed_input(path):
        return open_checkpoint(source_format or detect_format(path).name, path, options).check()


def open_any(path: Path, ignored_args: frozenset[str] = frozenset()) -> SourceCheckpoint:
    """Open a checkpoint of any format.

    Args:
        path: the checkpoint, or the folder of a run.
        ignored_args: arguments of a Megatron run to ignore; without effect on other formats.

    Raises:
        UserError: the folder contains no complete checkpoint of a known format.
    """
    check_is_folder(path)
    with malformed_input(path):
        return detect_format(path).read(path, ConversionOptions(ignored_args=ignored_args)).check()
