"""Draw the pictures of the documentation.

python -m tools.docs.pictures            # write docs/pictures/*.svg
python -m tools.docs.pictures --check    # exit code 1 if one is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from tools.docs.generated_files import write_or_check
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
    return write_or_check(
        argv, "tools.docs.pictures", "Draw the pictures of the documentation.", FOLDER, PICTURES
    )


if __name__ == "__main__":
    sys.exit(main())
