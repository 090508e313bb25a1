"""Draw the pictures of the documentation.

python -m tools.docs.pictures            # write docs/pictures/*.svg
python -m tools.docs.pictures --check    # exit code 1 if one is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from tools.docs.pictures import fold_schedule, parallel_layout, pipeline_schedule, stage_memory
from tools.docs.pictures.plans import ROOT

FOLDER = ROOT / "docs" / "pictures"
PICTURES: Mapping[str, Callable[[], str]] = {
    "fold_schedule.svg": fold_schedule.draw,
    "parallel_layout.svg": parallel_layout.draw,
    "pipeline_schedule.svg": pipeline_schedule.draw,
    "stage_memory.svg": stage_memory.draw,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures, or compare them with the files."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    check, outdated = parser.parse_args(argv).check, []
    for name, draw in PICTURES.items():
        path, picture = FOLDER / name, draw()
        if path.is_file() and path.read_text(encoding="utf-8") == picture:
            continue
        outdated.append(name)
        if not check:
            path.write_text(picture, encoding="utf-8")
    if check and outdated:
        names = ", ".join(outdated)
        print(f"out of date: {names}; run python -m tools.docs.pictures", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
