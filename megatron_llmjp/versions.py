"""Versions of this project and of the packages that decide the results and speed of a run.

Nothing is imported for it: torch alone takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import megatron_llmjp

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy")
"""Required packages, by their names on the package index."""


def format_versions(program: str) -> str:
    """Return the versions as lines; the first one is that of the program."""
    lines = [
        f"{program} (megatron_llmjp) {megatron_llmjp.__version__}",
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        f"CUDA {cuda_of_torch() or 'none: PyTorch is a CPU build'}",
        f"Transformer Engine {_version('transformer-engine')}",
        # The package apex of the package index is another program; NVIDIA's has this extension.
        f"Apex {_version('apex') if find_spec('amp_C') else 'not installed'}",
    ]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cuda_of_torch() -> str | None:
    """Return the CUDA version that torch was built for, from its ``version.py``."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


class VersionAction(argparse.Action):
    """Action of ``--version``: prints the versions and exits."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the versions on the standard output and exit with code 0."""
        with contextlib.suppress(BrokenPipeError):  # the reader (head, less) has exited
            print(format_versions(parser.prog), flush=True)
        parser.exit()


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--version``."""
    parser.add_argument(
        "--version",
        action=VersionAction,
        default=argparse.SUPPRESS,
        help="print the versions of the program, PyTorch, CUDA and other packages, and exit",
    )
