"""Write the reference pages of the documentation.

python -m tools.docs.reference            # write docs/reference/*.md
python -m tools.docs.reference --check    # exit code 1 if one is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.docs.generated_files import write_or_check
from tools.docs.reference import configuration, fold_files, programs

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "reference"
PAGES: Mapping[str, Callable[[], str]] = {
    "configuration.md": configuration.page,
    "fold_files.md": fold_files.page,
    "programs.md": programs.page,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them with the files."""
    return write_or_check(
        argv,
        "tools.docs.reference",
        "Write the reference pages of the documentation.",
        FOLDER,
        PAGES,
    )


if __name__ == "__main__":
    sys.exit(main())
