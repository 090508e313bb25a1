"""Benchmark: one blend of many datasets: time to the first batch, memory, open files and maps.

    python benchmarks/blend_startup.py --folder /tmp/blend                        # 0.5 T tokens
    python benchmarks/blend_startup.py --folder /tmp/blend --documents 20.7M --distinct 24

One fold draws one epoch of 113 datasets. Documents have log-normal lengths (900 tokens on average);
with 5 M documents per dataset the fold has 124 M samples of 4,096 tokens, with 20.7 M 2.1 T tokens.
The .bin are sparse files that use no disk space. The .idx are real, 20 bytes per document;
``--distinct N`` writes N of them, and the other datasets link to those.

Each row is a process of its own; the clock starts after the imports of torch and megatron-core. It
resolves the fold file, prepares the fold as the first rank of a machine does, and reads one global
batch, of which a rank of a real run reads a part. Cold: nothing is cached, and the .idx are evicted
from the page cache. Warm: a restart in the middle of the fold, as on every other rank. Files and
maps are those of the datasets and indices, at most at any time; the whole process has others, most
of them shared libraries. The check of all entries of the .idx runs in the background and is timed
on its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fold_startup import MEAN, measure_call, write_dataset  # noqa: E402
from megatron_llmjp.arguments import parse_count  # noqa: E402
from megatron_llmjp.formatting import format_count  # noqa: E402

LENGTH, BATCH = 4096, 2048
TARGETS = "targets: cold 20 s (60 s at 2.1 T tokens), warm 2 s, 200 MB, 64 files and maps"


def main() -> int:
    """Measure a cold and a warm start and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="folder for the data")
    add("--datasets", type=int, default=113, help="number of datasets")
    add("--documents", type=parse_count, default=5_000_000, help="documents per dataset")
    add("--distinct", type=int, default=None, help="number of different .idx (default: all)")
    add("--shuffle", choices=("blocks", "documents"), default=None, help="default: by size")
    add("--warm-starts", type=int, default=2, help="number of restarts")
    add("--check", action="store_true", help="also time the check that runs in the background")
    add("--child", choices=("cold", "warm", "check"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(SIDES[args.child](args)))
        return 0
    write_data(args)
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    sides = ["cold", *["warm"] * args.warm_starts, *["check"] * args.check]
    report([(side, run_child(side)) for side in sides], args)
    return 0


def write_data(args: argparse.Namespace) -> None:
    """Write the datasets that do not exist yet, and the fold file."""
    import yaml

    args.folder.mkdir(parents=True, exist_ok=True)
    distinct = min(args.distinct or args.datasets, args.datasets)
    for number in range(args.datasets):
        prefix = prefix_of(args.folder, number)
        original = prefix_of(args.folder, number % distinct)
        idx, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        if number < distinct:
            write_dataset(prefix, args.documents * MEAN, number)
            with idx.open("rb") as stream:
                os.fsync(stream.fileno())  # only clean pages can be evicted
        elif not idx.exists():
            os.link(original.with_suffix(".idx"), idx)
            with tokens.open("wb") as stream:
                stream.truncate(original.with_suffix(".bin").stat().st_size)
        with tokens.open("r+b") as stream:  # each dataset has a key of its own
            stream.write(number.to_bytes(2, "little"))
    blend = {f"d{n}": {"path": str(prefix_of(args.folder, n))} for n in range(args.datasets)}
    content: dict[str, Any] = {"folds": [{"name": "all", "epochs": 1, "blend": blend}]}
    if args.shuffle:
        content["shuffle"] = args.shuffle
    (args.folder / "folds.yaml").write_text(yaml.safe_dump(content))


def prefix_of(folder: Path, number: int) -> Path:
    """Return the prefix of a dataset."""
    return folder / f"d{number:04d}"


def run_child(side: str) -> dict[str, float]:
    """Measure one start in its own process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {result}", file=sys.stderr, flush=True)
    return result


def cold(args: argparse.Namespace) -> dict[str, float]:
    """Measure the first start of a run."""
    for path in args.folder.glob("*.idx"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return start(args, 0.0)


def warm(args: argparse.Namespace) -> dict[str, float]:
    """Measure a restart in the middle of the fold."""
    return start(args, 0.5)


def start(args: argparse.Namespace, progress: float) -> dict[str, float]:
    """Measure a start from a part of the fold."""
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.data.dataset import FoldDataset
    from megatron_llmjp.data.folds.datasets import save_facts
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.data.indices.prefetch import IndexPrefetcher
    from megatron_llmjp.run_data import index_cache_folder, resolve_data
    from megatron_llmjp.tokenizers import load_tokenizer

    flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --vocab-size 32000"
    where = f"--fold-file {args.folder / 'folds.yaml'} --data-cache-path {args.folder / 'cache'}"
    sizes = f"--seq-length {LENGTH} --global-batch-size {BATCH}"
    config = parse(f"{flags} {where} {sizes}".split()).config
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=31999)
    steps: dict[str, float] = {}

    def first_batch() -> FoldDataset:
        begun = time.monotonic()
        data = resolve_data(config)
        cache = index_cache_folder(config, data.folds)
        epochs = EpochDatasets(config.data, tokenizer, cache, datasets=data.datasets)
        samples = FoldDataset(data.schedule, epochs)
        prefetcher = IndexPrefetcher(samples, first_on_machine=True)
        first = int(data.schedule.total_samples * progress) // BATCH * BATCH
        prefetcher.start(first, BATCH, [])
        save_facts(data.datasets, cache)
        steps["prepared"] = time.monotonic() - begun
        for number in range(first, first + BATCH):
            assert len(samples[number]["tokens"]) == LENGTH
        prefetcher.close()
        return samples

    with most_open(args.folder) as opened:
        spent = time.process_time()
        figures, samples = measure_call(first_batch)
        figures["cpu"] = time.process_time() - spent
    sample_ms = (figures["seconds"] - steps["prepared"]) / BATCH * 1000
    tokens = samples.schedule.total_samples * LENGTH
    return {**figures, **steps, **opened, "sample_ms": sample_ms, "tokens": tokens}


def check(args: argparse.Namespace) -> dict[str, float]:
    """Measure the check of all entries of all .idx, which a run does in the background."""
    from megatron_llmjp.data.folds.datasets import check_datasets, inspect_datasets
    from megatron_llmjp.data.folds.loading import read_fold_file

    facts = inspect_datasets(read_fold_file(args.folder / "folds.yaml"), args.folder / "cache")
    figures, _ = measure_call(lambda: check_datasets(facts, args.folder / "cache"))
    return figures


SIDES = {"cold": cold, "warm": warm, "check": check}


def opened_file(link: Path) -> str:
    """Return the file that an entry of /proc/self/fd refers to; nothing if it was just closed."""
    try:
        return str(link.readlink())
    except FileNotFoundError:
        return ""


@contextmanager
def most_open(folder: Path) -> Iterator[dict[str, float]]:
    """Provide the largest numbers of open files and maps of a folder while the block runs."""
    found = {"files": 0.0, "maps": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            files = [opened_file(path) for path in Path("/proc/self/fd").iterdir()]
            maps = Path("/proc/self/maps").read_text().splitlines()
            for name, lines in (("files", files), ("maps", maps)):
                found[name] = max(found[name], sum(str(folder) in line for line in lines))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield found
    done.set()
    thread.join()


def report(rows: list[tuple[str, dict[str, float]]], args: argparse.Namespace) -> None:
    """Print the table."""
    tokens = format_count(int(rows[0][1]["tokens"]))
    print(
        f"{args.datasets} datasets of {args.documents:,} documents, {tokens} tokens, "
        f"first batch of {BATCH:,} samples of {LENGTH:,}; {TARGETS}"
    )
    print("| start | seconds | CPU s | prepared | ms/sample | own MiB | peak MiB | files | maps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side, row in rows:
        if side == "check":
            print(f"| {side} | {row['seconds']:.1f} | | | | {row['private']:.0f} | | | |")
            continue
        times = f"{row['seconds']:.2f} | {row['cpu']:.2f} | {row['prepared']:.2f} | "
        times += f"{row['sample_ms']:.2f}"
        memory = f"{row['private']:.0f} | {row['peak']:.0f}"
        print(f"| {side} | {times} | {memory} | {row['files']:.0f} | {row['maps']:.0f} |")


if __name__ == "__main__":
    sys.exit(main())
