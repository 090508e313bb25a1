"""Command line of the programs that generate files of the documentation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def write_or_check(
    argv: Sequence[str] | None,
    module: str,
    description: str,
    folder: Path,
    files: Mapping[str, Callable[[], str]],
) -> int:
    """Write files, or with ``--check`` compare them; return the exit code.

    Args:
        argv: command line; that of the process by default.
        module: module that generates the files, for messages.
        description: of the program, for ``--help``.
        folder: folder of the files.
        files: functions that return the contents, by name.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    check, outdated = parser.parse_args(argv).check, []
    for name, generate in files.items():
        path, text = folder / name, generate()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        outdated.append(name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and outdated:
        names = ", ".join(outdated)
        print(f"out of date: {names}; run python -m {module}", file=sys.stderr)
        return 1
    return 0
