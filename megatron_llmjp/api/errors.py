"""Errors of the Python interface: all are :class:`UserError`, with one message that explains."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from megatron_llmjp.errors import DataError, RunError, UserError

P = ParamSpec("P")
R = TypeVar("R")


class DatasetError(UserError):
    """A dataset is damaged."""


class NotInstalledError(UserError):
    """An optional package is required and not installed."""


class OutOfRangeError(UserError, IndexError):
    """A number of a document, sample or iteration does not exist."""


class OperationError(UserError):
    """A file cannot be read or written, or an operation failed for another known reason."""


@contextmanager
def only_user_errors() -> Iterator[None]:
    """Convert the errors that programs print, and those of files, to user errors."""
    try:
        yield
    except DataError as error:
        raise DatasetError(str(error)) from error
    except (RunError, argparse.ArgumentTypeError) as error:
        raise OperationError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise OperationError(f"{where}{error.strerror or error}") from error
    except SystemExit as exit_:
        raise OperationError(f"unexpected exit ({exit_.code})") from exit_


def raises_user_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Apply :func:`only_user_errors` to a function of the interface."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with only_user_errors():
            return function(*args, **kwargs)

    return call
