"""Write the reference pages of the documentation.

python -m tools.docs.reference            # write docs/reference/*.md
python -m tools.docs.reference --check    # exit code 1 if one is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.docs.reference import configuration, fold_files, programs

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "reference"
PAGES: Mapping[str, Callable[[], str]] = {
    "configuration.md": configuration.page,
    "fold_files.md": fold_files.page,
    "programs.md": programs.page,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them with the files."""
    parser = argparse.ArgumentParser(description="Write the reference pages of the documentation.")
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    check, outdated = parser.parse_args(argv).check, []
    for name, write in PAGES.items():
        path, page = FOLDER / name, write()
        if path.is_file() and path.read_text(encoding="utf-8") == page:
            continue
        outdated.append(name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(page, encoding="utf-8")
    if check and outdated:
        names = ", ".join(outdated)
        print(f"out of date: {names}; run python -m tools.docs.reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
