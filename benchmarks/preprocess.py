"""Benchmark: preprocess_data, compared with the raw tokenizer and Megatron-LM's tool.

One table; all sides are measured alternately in one run, because the speed of a shared machine
drifts:

    python benchmarks/preprocess.py --corpus corpus.jsonl --tokenizer-model tok.model \
        --workers 2 --megatron-lm ../Megatron-LM

MB are 10^6 bytes of UTF-8 text, without JSON escapes. "Steady state" excludes the start: it is the
slope between a run over the corpus once and a run over --repeat copies of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="JSON lines with a text key")
    add("--tokenizer-model", type=Path, required=True, help="SentencePiece model")
    add("--workers", type=int, default=2)
    add("--repeat", type=int, default=6, help="copies of the corpus in the long run")
    add("--rounds", type=int, default=5)
    add("--megatron-lm", type=Path, help="checkout of Megatron-LM, to measure its tool")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        report(args, Path(work))
    return 0


def report(args: argparse.Namespace, work: Path) -> None:
    """Run all sides alternately, ``rounds`` times, and print the table."""
    texts = [json.loads(line)["text"] for line in args.corpus.open(encoding="utf-8")]
    size = sum(len(text.encode()) for text in texts) / 1e6
    short, long = work / "short.jsonl", work / "long.jsonl"
    short.write_bytes(args.corpus.read_bytes())
    long.write_bytes(args.corpus.read_bytes() * args.repeat)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer_model))
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        before = seconds_raw(processor, texts)
        ours = whole_and_steady(seconds_ours, args, short, long, size, work)
        raw = 2 * size / (before + seconds_raw(processor, texts))
        found["raw SentencePiece encode, 1 thread|MB/s"].append(raw)
        found["preprocess_data, steady state|MB/s"].append(ours[1])
        found[f"  share of {args.workers} x raw|%"].append(100 * ours[1] / (args.workers * raw))
        found["  start to first document|s"].append(first_document(args, short, work))
        found["  the corpus once, with start|s"].append(ours[0])
        if args.megatron_lm:
            theirs = whole_and_steady(seconds_theirs, args, short, long, size, work)
            found["Megatron-LM's tool, steady state|MB/s"].append(theirs[1])
            found["  the corpus once, with start|s "].append(theirs[0])
            found["  preprocess_data is faster, steady|x"].append(ours[1] / theirs[1])
            found["  preprocess_data is faster, whole run|x"].append(theirs[0] / ours[0])
    print(f"{args.corpus.name}: {len(texts):,} documents, {size:.1f} MB, {args.workers} workers,")
    print(f"median of {args.rounds} rounds (lowest to highest), {os.cpu_count()} cores\n")
    for name, values in found.items():
        title, unit = name.split("|")
        row(title, unit, values)


def whole_and_steady(
    seconds: Callable[[argparse.Namespace, Path, Path], float],
    args: argparse.Namespace,
    short: Path,
    long: Path,
    size: float,
    work: Path,
) -> tuple[float, float]:
    """Return the seconds of a run over the corpus, and the MB/s of additional copies."""
    once = seconds(args, short, work)
    more = seconds(args, long, work) - once
    return once, size * (args.repeat - 1) / max(more, 1e-9)


def row(name: str, unit: str, values: list[float]) -> None:
    """Print one line of the table."""
    low, high = min(values), max(values)
    print(f"{name:38} {statistics.median(values):8.2f} {unit:5} ({low:.2f} to {high:.2f})")


def seconds_raw(processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> float:
    """Return the time of encoding all texts, one after the other."""
    started = time.perf_counter()
    for text in texts:
        processor.encode(text)
    return time.perf_counter() - started


def our_command(args: argparse.Namespace, corpus: Path, work: Path) -> list[str]:
    """Return the command of preprocess_data."""
    command = [sys.executable, "-m", "data_tools.preprocess_data", "--input", str(corpus.resolve())]
    command += ["--output-prefix", str(work / "ours"), "--overwrite", "--append-eod"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--workers", str(args.workers)]
    return [*command, "--tokenizer-model", str(args.tokenizer_model.resolve())]


def seconds_ours(args: argparse.Namespace, corpus: Path, work: Path) -> float:
    """Return the time of a whole run of preprocess_data."""
    started = time.perf_counter()
    subprocess.run(our_command(args, corpus, work), check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - started


def first_document(args: argparse.Namespace, corpus: Path, work: Path) -> float:
    """Return the time from the start until a first document has been written."""
    started = time.perf_counter()
    command = [*our_command(args, corpus, work), "--log-interval", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
    ) as run:
        assert run.stderr is not None
        run.stderr.readline()
        seconds = time.perf_counter() - started
        run.stderr.read()
    return seconds


def seconds_theirs(args: argparse.Namespace, corpus: Path, work: Path) -> float:
    """Return the time of a whole run of Megatron-LM's tools/preprocess_data.py."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(corpus.resolve())]
    command += ["--output-prefix", str(work / "theirs"), "--append-eod"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--workers", str(args.workers)]
    command += ["--tokenizer-model", str(args.tokenizer_model.resolve())]
    started = time.perf_counter()
    # The checkout comes first: its tools do not match the installed megatron-core.
    paths = [str(args.megatron_lm.resolve()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": ":".join(paths)}
    subprocess.run(command, check=True, capture_output=True, cwd=args.megatron_lm, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
