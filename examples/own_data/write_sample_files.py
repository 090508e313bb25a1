"""Sample files: JSON lines, plain and compressed, with copies and a line that was cut.

    python write_sample_files.py FOLDER

Replaced by your own files: INPUT=FOLDER ./run.sh
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "quickstart" / "corpus"


def main() -> None:
    """Write two files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    japanese = (CORPUS / "ja.jsonl").read_text(encoding="utf-8").splitlines()
    broken = '{"text": "a line that was cut'
    (folder / "ja.jsonl").write_text("\n".join([*japanese, japanese[0], broken]) + "\n", "utf-8")
    english = (CORPUS / "en.jsonl").read_text(encoding="utf-8").splitlines()
    short = json.dumps({"text": "too short"})
    with gzip.open(folder / "en.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join([*english, *english[:3], short]) + "\n")


if __name__ == "__main__":
    main()
