"""Benchmark: the cost of preprocess_data --record-sources, in CPU seconds.

    python benchmarks/record_sources.py --corpus corpus.jsonl --tokenizer-type ByteLevelTokenizer

Runs without and with --record-sources, and with an id of each document, alternate, because the
speed of a shared machine drifts. CPU seconds are those of all processes, including the start of
the program. Other flags are passed to preprocess_data.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIDES = {
    "without sources": [],
    "--record-sources": ["--record-sources"],
    "with --id-key": ["--record-sources", "--id-key", "id"],
}


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="JSON lines with a text key")
    add("--copies", type=int, default=5, help="copies of the corpus in the input file")
    add("--workers", type=int, default=2)
    add("--rounds", type=int, default=7)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        documents = write_corpus(args.corpus, args.copies, work / "corpus.jsonl")
        found: dict[str, list[float]] = {name: [] for name in SIDES}
        sizes = {}
        for _ in range(args.rounds):
            for name, more in SIDES.items():
                command = ["--workers", str(args.workers), *flags, *more]
                found[name].append(run(command, work))
                path = work / "out" / "o_text_document.sources"
                sizes[name] = path.stat().st_size / documents if more else 0.0
        print_table(found, sizes)
    return 0


def write_corpus(corpus: Path, copies: int, path: Path) -> int:
    """Write copies of a corpus with an id of each document; return the number of documents."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(lines * copies):
            record = json.loads(line) | {"id": f"https://example.org/page/{number}"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return len(lines) * copies


def run(flags: list[str], work: Path) -> float:
    """Return the CPU seconds of one job."""
    shutil.rmtree(work / "out", ignore_errors=True)
    command = [sys.executable, "-m", "data_tools.preprocess_data", *flags]
    command += ["--input", str(work / "corpus.jsonl"), "--output-prefix", str(work / "out" / "o")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_table(found: dict[str, list[float]], sizes: dict[str, float]) -> None:
    """Print median, lowest and highest CPU seconds, their ratio, and bytes per document."""
    base = statistics.median(found["without sources"])
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(
            f"| {name} | {median:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{median / base - 1:+.1%} | {sizes[name]:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
