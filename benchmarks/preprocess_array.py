"""Benchmark: preprocess_data as an array of tasks, compared with one job.

    python benchmarks/preprocess_array.py --corpus corpus.jsonl --tokenizer-model tok.model

Each part is processed alone, one after the other, with the same number of workers as the job over
the whole corpus: every part has the machine to itself, as on a node of its own. "Efficiency on N
nodes" is the time of the one job divided by N times that of the slowest part; what nodes share,
such as the file system, is not measured. CPU seconds are those of all processes. All sides are
measured alternately, because the speed of a shared machine drifts; on a machine with other load
only the CPU seconds are meaningful.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and CPU seconds of all processes."""

    wall: float
    cpu: float


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="JSON lines with a text key")
    add("--tokenizer-model", type=Path, required=True, help="SentencePiece model")
    add("--copies", type=int, default=12, help="copies of the corpus in the one input file")
    add("--tasks", type=int, default=4)
    add("--workers", type=int, default=2, help="of the one job and of each part")
    add("--rounds", type=int, default=3)
    add("--pzstd", action="store_true", help="compress the input file with pzstd")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        report(args, Path(work))
    return 0


def report(args: argparse.Namespace, work: Path) -> None:
    """Run all sides alternately, and print the table."""
    corpus = work / "corpus.jsonl"
    corpus.write_bytes(args.corpus.read_bytes() * args.copies)
    size = corpus.stat().st_size / 1e6
    if args.pzstd:
        subprocess.run(["pzstd", "-q", "--rm", "-p", "2", str(corpus)], check=True)
        corpus = work / "corpus.jsonl.zst"
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        one = run(args, corpus, work / f"{number}" / "one", [])
        prefix = work / f"{number}" / "parts"
        parts = [
            run(args, corpus, prefix, ["--shard", f"{at}/{args.tasks}"]) for at in range(args.tasks)
        ]
        merge = measure("merge_datasets", "--parts", str(prefix))
        check_same(work / f"{number}" / "one", prefix)
        shutil.rmtree(work / f"{number}")
        slowest, cpu = max(part.wall for part in parts), [part.cpu for part in parts]
        found["one job|s"].append(one.wall)
        found["slowest part alone|s"].append(slowest)
        found["merge|s"].append(merge.wall)
        found[f"efficiency on {args.tasks} nodes|%"].append(100 * one.wall / args.tasks / slowest)
        with_merge = one.wall / args.tasks / (slowest + merge.wall)
        found[f"efficiency on {args.tasks} nodes, with the merge|%"].append(100 * with_merge)
        found["one job, CPU|s"].append(one.cpu)
        found["all parts, CPU|s"].append(sum(cpu))
        found["merge, CPU|s"].append(merge.cpu)
        found["CPU of all parts above that of one job|%"].append(100 * (sum(cpu) / one.cpu - 1))
        found["largest part above the mean, CPU|%"].append(
            100 * (max(cpu) * args.tasks / sum(cpu) - 1)
        )
    print(f"{corpus.name}: {size:.0f} MB of text, {args.workers} workers, {args.tasks} parts,")
    print(f"median of {args.rounds} rounds (lowest to highest), {os.cpu_count()} cores\n")
    for name, values in found.items():
        title, unit = name.split("|")
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"{title:42} {middle:8.2f} {unit:2} ({low:.2f} to {high:.2f})")


def run(args: argparse.Namespace, corpus: Path, prefix: Path, more: list[str]) -> Cost:
    """Return the cost of one job or part."""
    words = ["--input", str(corpus), "--output-prefix", str(prefix), "--append-eod", *more]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--workers", str(args.workers)]
    model = str(args.tokenizer_model.resolve())
    return measure("preprocess_data", *words, "--tokenizer-model", model)


def measure(program: str, *words: str) -> Cost:
    """Return the cost of a program of data_tools and of its processes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", f"data_tools.{program}", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{program} {' '.join(words)}: status {status}")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime)


def check_same(one: Path, other: Path) -> None:
    """Check that both outputs have the same bytes."""
    for suffix in ("bin", "idx"):
        files = [Path(f"{prefix}_text_document.{suffix}") for prefix in (one, other)]
        if files[0].read_bytes() != files[1].read_bytes():
            raise SystemExit(f"{files[0]} and {files[1]} differ")


if __name__ == "__main__":
    sys.exit(main())
