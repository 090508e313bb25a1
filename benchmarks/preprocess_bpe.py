"""Benchmark: preprocess_data with byte-level BPE, with and without gigatoken, and other tools.

One table; all sides are measured alternately in one run:

    python benchmarks/preprocess_bpe.py --corpus corpus.jsonl --tokenizer FOLDER \
        --unigram-model tok.model --workers 2 --rounds 3

The corpus is divided into one file per worker, which all sides read. MB are 10^6 bytes of UTF-8
text. A row has the speed of the whole process by the clock, and the CPU time of all its processes
per MB, which is comparable on a machine with other load too. ``datasets`` and ``datatrove`` are
measured if they can be imported (``--peers`` is a folder with them), Megatron-LM's tools if
``--megatron-lm`` is a checkout. Text of the corpus should not repeat: gigatoken caches words.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("jsonl.gz", "jsonl.zst", "parquet")


def main() -> int:
    """Measure and print one table; with ``--side``, be one of the sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="JSON lines with a text key")
    add("--tokenizer", type=Path, required=True, help="folder with a byte-level tokenizer.json")
    add("--unigram-model", type=Path, help="SentencePiece Unigram model, to measure it too")
    add("--workers", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--slow-mb", type=float, default=10, help="MB of the corpus for sides below 20 MB/s")
    add("--peers", type=Path, help="folder with datasets and datatrove (pip install --target)")
    add("--megatron-lm", type=Path, help="checkout of Megatron-LM, to measure its tools")
    add("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args)
        return 0
    with tempfile.TemporaryDirectory() as work:
        report(args, Path(work))
    return 0


def report(args: argparse.Namespace, work: Path) -> None:
    """Run all sides alternately, and print the table."""
    lines = args.corpus.read_bytes().splitlines(keepends=True)
    sizes = {
        "whole": write_parts(work / "whole", lines, args.workers),
        "slow": write_parts(work / "slow", up_to(lines, args.slow_mb * 1e6), args.workers),
    }
    write_formats(work)
    commands = list_commands(args, work)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for name, (data, command) in commands.items():
            seconds, cpu = measure(command, args, work)
            found[name].append((sizes[data] / seconds, 1000 * cpu / sizes[data]))
    print(f"{args.corpus.name}: {sizes['whole']:.1f} MB of text, {args.workers} workers,")
    print(f"medians of {args.rounds} rounds (lowest to highest), {os.cpu_count()} cores\n")
    print("| side | MB/s, whole process | CPU ms per MB | MB |\n|---|---|---|---|")
    for name, pairs in found.items():
        speed, cpu_ms = (describe(values) for values in zip(*pairs, strict=True))
        print(f"| {name} | {speed} | {cpu_ms} | {sizes[commands[name][0]]:.0f} |")


def describe(values: tuple[float, ...]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def up_to(lines: list[bytes], size: float) -> list[bytes]:
    """Return the first lines, of about ``size`` bytes."""
    total = 0.0
    for number, line in enumerate(lines):
        total += len(line)
        if total > size:
            return lines[:number]
    return lines


def write_parts(folder: Path, lines: list[bytes], count: int) -> float:
    """Write lines to ``count`` files, and return the MB of their texts."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines[number::count]))
    return sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6


def write_formats(work: Path) -> None:
    """Write the whole corpus in other formats."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    for suffix in FORMATS:
        (work / suffix).mkdir()
        for path in (work / "whole").iterdir():
            data, output = path.read_bytes(), work / suffix / f"{path.stem}.{suffix}"
            if suffix == "jsonl.gz":
                output.write_bytes(gzip.compress(data, 6))
            elif suffix == "jsonl.zst":
                output.write_bytes(zstandard.compress(data, 3))
            else:
                texts = [json.loads(line)["text"] for line in data.splitlines()]
                pyarrow.parquet.write_table(pyarrow.table({"text": texts}), output)


def list_commands(args: argparse.Namespace, work: Path) -> dict[str, tuple[str, list[str]]]:
    """Return the part of the corpus and the command of each side, by its name."""
    ours = [sys.executable, "-m", "data_tools.preprocess_data", "--append-eod", "--overwrite"]
    ours += ["--output-prefix", str(work / "ours"), "--workers", str(args.workers)]
    bpe = [*ours, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    bpe += [str(args.tokenizer.resolve())]
    whole, slow = str(work / "whole"), str(work / "slow")
    sides = {
        "preprocess_data, gigatoken": (
            "whole",
            [*bpe, "--gigatoken", "required", "--input", whole],
        ),
        **{
            f"preprocess_data, gigatoken, {suffix}": (
                "whole",
                [*bpe, "--gigatoken", "required", "--input", str(work / suffix)],
            )
            for suffix in FORMATS
        },
        "preprocess_data, tokenizers": ("slow", [*bpe, "--gigatoken", "off", "--input", slow]),
        "tokenizers, loop over encode_batch": ("slow", side("tokenizers", args, slow)),
    }
    for name in ("datasets", "datatrove"):
        if args.peers is not None or importlib.util.find_spec(name) is not None:
            sides[name] = ("slow", side(name, args, slow))
    if args.megatron_lm is not None:
        sides["Megatron-LM, preprocess_data.py"] = ("slow", side("megatron", args, slow))
    if args.unigram_model is not None:
        model = str(args.unigram_model.resolve())
        unigram = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
        sides["Unigram: preprocess_data"] = ("whole", [*ours, *unigram, "--input", whole])
        sides["Unigram: raw SentencePiece, 1 thread"] = (
            "whole",
            side("sentencepiece", args, whole),
        )
    return sides


def side(name: str, args: argparse.Namespace, data: str) -> list[str]:
    """Return the command that runs this file as one of the sides."""
    command = [sys.executable, __file__, "--side", name, "--corpus", data]
    command += ["--tokenizer", str(args.tokenizer.resolve()), "--workers", str(args.workers)]
    for flag in ("unigram_model", "megatron_lm"):
        if (value := getattr(args, flag)) is not None:
            command += [f"--{flag.replace('_', '-')}", str(value.resolve())]
    return command


def measure(command: list[str], args: argparse.Namespace, work: Path) -> tuple[float, float]:
    """Return the seconds of a command, and its CPU seconds."""
    paths = [str(ROOT), *([str(args.peers.resolve())] if args.peers else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(work / "hf")}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, cwd=work, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def texts_of(folder: Path) -> list[str]:
    """Return the texts of all files."""
    lines = (line for path in sorted(folder.iterdir()) for line in path.open(encoding="utf-8"))
    return [json.loads(line)["text"] for line in lines]


def run_tokenizers(args: argparse.Namespace) -> None:
    """Encode all texts in batches, with threads of the library."""
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    texts = texts_of(args.corpus)
    for at in range(0, len(texts), 1000):
        for encoding in fast.encode_batch_fast(texts[at : at + 1000], add_special_tokens=False):
            _ = encoding.ids


def run_sentencepiece(args: argparse.Namespace) -> None:
    """Encode all texts, one after the other."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(args.unigram_model))
    for text in texts_of(args.corpus):
        processor.encode(text)


def run_datasets(args: argparse.Namespace) -> None:
    """Read the files with datasets, and encode batches in processes; nothing else is written."""
    import tokenizers

    datasets: Any = importlib.import_module("datasets")

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fast = tokenizers.Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    files = [str(path) for path in sorted(args.corpus.iterdir())]
    loaded = datasets.load_dataset("json", data_files=files, split="train")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = fast.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids for encoding in found]}

    loaded.map(encode, batched=True, num_proc=args.workers, remove_columns=loaded.column_names)


def run_datatrove(args: argparse.Namespace) -> None:
    """Tokenize with datatrove, one task per file, without shuffling."""
    executor: Any = importlib.import_module("datatrove.executor")
    readers: Any = importlib.import_module("datatrove.pipeline.readers")
    tokens: Any = importlib.import_module("datatrove.pipeline.tokens")

    with tempfile.TemporaryDirectory() as output:
        executor.LocalPipelineExecutor(
            [
                readers.JsonlReader(str(args.corpus)),
                tokens.DocumentTokenizer(
                    output,
                    tokenizer_name_or_path=str(args.tokenizer / "tokenizer.json"),
                    eos_token="<|endoftext|>",
                    shuffle_documents=False,
                ),
            ],
            tasks=args.workers,
            workers=args.workers,
            logging_dir=f"{output}/logs",
        ).run()


def run_megatron(args: argparse.Namespace) -> None:
    """Run Megatron-LM's tools/preprocess_data.py on the files joined to one."""
    with tempfile.TemporaryDirectory() as output:
        joined = Path(output) / "joined.jsonl"
        joined.write_bytes(b"".join(path.read_bytes() for path in sorted(args.corpus.iterdir())))
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(joined)]
        command += ["--output-prefix", f"{output}/o", "--append-eod", "--workers"]
        command += [str(args.workers), "--tokenizer-type", "HuggingFaceTokenizer"]
        command += ["--tokenizer-model", str(args.tokenizer)]
        # The checkout comes first: its tools do not match the installed megatron-core.
        environment = os.environ | {"PYTHONPATH": str(args.megatron_lm)}
        subprocess.run(command, check=True, cwd=args.megatron_lm, env=environment)


SIDES = {
    "tokenizers": run_tokenizers,
    "sentencepiece": run_sentencepiece,
    "datasets": run_datasets,
    "datatrove": run_datatrove,
    "megatron": run_megatron,
}

if __name__ == "__main__":
    sys.exit(main())
