"""User-defined functions that select and change documents: the Python file of ``--hooks``.

The file defines ``keep(document: dict) -> bool``, ``transform(document: dict) -> dict``, or both.
``keep`` is called first; ``transform`` is called with the documents that are kept. They run in the
worker processes, so that the result for a document must depend on this document only.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.preprocess.input.json_lines import BadLine
from data_tools.preprocess.selection.removal import FILTERED, RemovedDocument
from megatron_llmjp.errors import UserError

NAMES = ("keep", "transform")
MODULE = "preprocess_data_hooks"
"""Name under which the file is imported."""
ERROR = "error in --hooks"
"""Reason to count a line under for which a function fails."""


@dataclass(frozen=True)
class DocumentHooks:
    """The functions of one file, and its checksum.

    Attributes:
        path: the file.
        digest: SHA-256 of its contents.
        keep: returns whether to keep a document; None keeps all.
        transform: returns the document to encode; None changes none.
    """

    path: str
    digest: str
    keep: Callable[[dict[str, Any]], Any] | None
    transform: Callable[[dict[str, Any]], Any] | None

    def apply(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document to encode.

        Raises:
            RemovedDocument: ``keep`` returned False.
            BadLine: a function raised an exception or returned another type.
        """
        if self.keep is not None:
            kept = self._call(self.keep, document)
            if not isinstance(kept, bool | np.bool_):
                raise self._wrong_result(self.keep, kept, "True or False")
            if not kept:
                raise RemovedDocument(FILTERED)
        if self.transform is None:
            return document
        changed = self._call(self.transform, document)
        if not isinstance(changed, dict):
            raise self._wrong_result(self.transform, changed, "a dict")
        return changed

    def _call(self, function: Callable[[dict[str, Any]], Any], document: dict[str, Any]) -> Any:
        try:
            return function(document)
        except (Exception, SystemExit) as error:
            raise BadLine(ERROR, _describe(self.path, error)) from error

    def _wrong_result(self, function: Callable[..., Any], result: Any, expected: str) -> BadLine:
        code = getattr(function, "__code__", None)
        line = f":{code.co_firstlineno}" if code is not None else ""
        name = getattr(function, "__name__", "function")
        found = f"{type(result).__name__} {str(result)[:40]!r}"
        return BadLine(ERROR, f"{self.path}{line}: {name}() returned {found}, expected {expected}")


def _describe(path: str, error: BaseException) -> str:
    """Return the last line of the file that an exception passed through, and the exception."""
    passed = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in passed if frame.filename == path]
    where = f"{path}:{frames[-1].lineno}" if frames else path
    function = f" in {frames[-1].name}()" if frames and frames[-1].name != "<module>" else ""
    return f"{where}: {type(error).__name__}: {error}{function}"


def load_hooks(name: str) -> DocumentHooks:
    """Execute a file of hooks.

    Raises:
        UserError: the file is not readable, fails, or defines no valid function.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--hooks {name}: no such file")
    source = path.read_bytes()
    module = types.ModuleType(MODULE)
    module.__file__ = name
    sys.modules[MODULE] = module  # dataclasses look up the module of their annotations
    try:
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        raise UserError(f"--hooks {name}:{error.lineno}: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--hooks {_describe(name, error)}") from error
    found = {function: getattr(module, function, None) for function in NAMES}
    if not any(found.values()):
        raise UserError(
            f"--hooks {name}: defines neither keep(document) -> bool nor "
            "transform(document) -> dict; define at least one of them"
        )
    for function_name, function in found.items():
        if function is not None:
            _check_function(f"--hooks {name}: {function_name}", function)
    digest = hashlib.sha256(source).hexdigest()
    return DocumentHooks(name, digest, found["keep"], found["transform"])


def add_hook_flags(add: Callable[..., Any]) -> None:
    """Add the flag of the file of hooks."""
    add(
        "--hooks",
        metavar="FILE",
        help="Python file that defines keep(document: dict) -> bool, to select documents, "
        "transform(document: dict) -> dict, to change them, or both",
    )


def _check_function(what: str, function: Any) -> None:
    if not callable(function):
        raise UserError(f"{what} is {type(function).__name__}, expected a function")
    try:
        inspect.signature(function).bind({})
    except TypeError as error:
        raise UserError(
            f"{what}{inspect.signature(function)} must accept one argument, the document ({error})"
        ) from error
