"""Benchmark: time to the first batch and memory per process, folds compared with Megatron's blend.

    python benchmarks/fold_startup.py --folder /tmp/fold_startup

Synthetic data: 30 B tokens (times --scale) in 55 datasets, five in each of 11 folds, documents of
log-normal length (median 545, mean 900 tokens). The .bin are sparse files that use no disk space;
the .idx are real. Both sides read the same files, each in its own process, alternately: the first
1, 3 and all 11 folds of the run. Cold: no index is cached. Warm: a restart, as on every other rank.
The clock starts after the imports of torch and megatron-core.

Megatron's blend covers 99 % of the samples: otherwise its surplus of 0.5 % would start a second
epoch of every dataset. ``--shuffle documents`` measures folds with megatron-core's stored indices.
``blend_startup.py`` measures one fold of 113 datasets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FOLDS, SOURCES, TOKENS = 11, 5, 30e9
LENGTH, BATCH = 4096, 8
LOG_MEDIAN, LOG_SIGMA = 6.3, 1.0
MEAN = float(np.exp(LOG_MEDIAN + LOG_SIGMA**2 / 2))
MIB = 1 << 20


def main() -> int:
    """Measure all sides alternately and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="folder for the data (0.7 GB at full scale)")
    add("--scale", type=float, default=1.0, help="fraction of the 30 B tokens")
    add("--rounds", type=int, default=2, help="rounds; the table shows medians")
    add("--shuffle", choices=("blocks", "documents"), default="blocks", help="of the folds")
    add("--child", nargs=2, metavar=("SIDE", "FOLDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, folds = args.child
        print(json.dumps(SIDES[side](args, int(folds))))
        return 0
    write_data(args.folder, args.scale)
    report(measure(args), args)
    return 0


def write_data(folder: Path, scale: float) -> None:
    """Write all datasets."""
    folder.mkdir(parents=True, exist_ok=True)
    share = TOKENS * scale / (FOLDS * SOURCES)
    names = [f"fold{fold:02d}_{source}" for fold in range(FOLDS) for source in range(SOURCES)]
    for number, name in enumerate(names):
        write_dataset(folder / name, share * (0.6 + 0.2 * (number % SOURCES)), number)


def write_dataset(prefix: Path, tokens: float, seed: int) -> None:
    """Write an .idx of documents of random lengths, and a sparse .bin."""
    from megatron_llmjp.data.indexed_dataset_writer import write_idx

    if prefix.with_suffix(".idx").exists():
        return
    generator = np.random.default_rng(seed)
    drawn = generator.lognormal(LOG_MEDIAN, LOG_SIGMA, max(2, int(tokens / MEAN)))
    lengths = np.clip(drawn, 1, 1 << 20).astype(np.int32)
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))
    pointers = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    counts = np.ones(len(lengths), np.int32)
    write_idx(prefix.with_suffix(".idx"), np.dtype(np.uint16), lengths, counts, pointers)


def measure(args: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """Run every side with every number of folds, and return medians."""
    found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for folds in (1, 3, FOLDS):
            for side in ("ours", "megatron"):
                shutil.rmtree(args.folder / "cache", ignore_errors=True)
                cold, warm = (run_child(args, side, folds) for _ in range(2))
                found[side, folds].append(
                    {
                        "cold": cold["seconds"],
                        "cold_peak": cold["peak"],
                        "warm": warm["seconds"],
                        "private": warm["private"],
                        "edge": cold.get("edge", 0.0),
                    }
                )
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    return {
        key: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for key, runs in found.items()
    }


def run_child(args: argparse.Namespace, side: str, folds: int) -> dict[str, float]:
    """Measure one side in its own process."""
    command = [sys.executable, __file__, "--folder", str(args.folder), "--shuffle", args.shuffle]
    command += ["--child", side, str(folds)]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side} {folds}: {result}", file=sys.stderr, flush=True)
    return result


def ours(args: argparse.Namespace, folds: int) -> dict[str, float]:
    """Measure the run's first batch on a rank, and the first batch of the next fold."""
    import yaml

    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.data.dataset import FoldDataset
    from megatron_llmjp.data.folds.datasets import save_facts
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.data.indices.prefetch import IndexPrefetcher
    from megatron_llmjp.run_data import index_cache_folder, resolve_data
    from megatron_llmjp.tokenizers import load_tokenizer

    folder = args.folder
    content = [
        {"name": f"f{f:02d}", "epochs": 1, "blend": {p.name: {"path": str(p)} for p in paths}}
        for f, paths in enumerate(prefixes(folder, folds))
    ]
    file = {"shuffle": args.shuffle, "folds": content}
    (folder / "folds.yaml").write_text(yaml.safe_dump(file))
    flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --vocab-size 32000"
    where = f"--fold-file {folder / 'folds.yaml'} --seq-length {LENGTH}"
    where += f" --data-cache-path {folder / 'cache'}"
    config = parse(f"{flags} {where} --global-batch-size {BATCH}".split()).config
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=31999)

    def first_batch() -> tuple[FoldDataset, IndexPrefetcher]:
        run_data = resolve_data(config)
        cache = index_cache_folder(config, run_data.folds)
        epochs = EpochDatasets(config.data, tokenizer, cache, datasets=run_data.datasets)
        data = FoldDataset(run_data.schedule, epochs)
        prefetcher = IndexPrefetcher(data, first_on_machine=True, log=lambda text: None)
        prefetcher.start(0, BATCH, [])
        save_facts(run_data.datasets, cache)
        batch_at(data, 0)
        return data, prefetcher

    figures, (data, prefetcher) = measure_call(first_batch)
    if folds > 1:
        background = prefetcher._background
        if background is not None:
            background.wait()
        edge = data.schedule.folds[1].first_sample
        started = time.monotonic()
        prefetcher.ensure_ready(edge, BATCH)
        batch_at(data, edge)
        figures["edge"] = time.monotonic() - started
    prefetcher.close()
    return figures


def megatron(args: argparse.Namespace, folds: int) -> dict[str, float]:
    """Measure the first batch of megatron-core's blend of all datasets of these folds."""
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_llmjp.data.indices.epoch_index import DatasetTokenizer

    folder = args.folder
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    paths = [str(path) for fold in prefixes(folder, folds) for path in fold]
    tokens = [Path(f"{path}.bin").stat().st_size // 2 for path in paths]
    samples = int(sum(tokens) // LENGTH * 0.99)

    def first_batch() -> Any:
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=LENGTH,
            blend=(paths, [float(n) for n in tokens]),
            split="1,0,0",
            path_to_cache=str(folder / "cache"),
            tokenizer=DatasetTokenizer(31999, 32000),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
        data = builder.build()[0]
        batch_at(data, 0)
        return data

    figures, _ = measure_call(first_batch)
    dist.destroy_process_group()
    return figures


SIDES: dict[str, Callable[[argparse.Namespace, int], dict[str, float]]] = {
    "ours": ours,
    "megatron": megatron,
}


def prefixes(folder: Path, folds: int) -> list[list[Path]]:
    """Return the dataset paths of the first folds."""
    return [[folder / f"fold{f:02d}_{s}" for s in range(SOURCES)] for f in range(folds)]


def batch_at(data: Any, first: int) -> None:
    """Read the samples of one batch."""
    for number in range(first, first + BATCH):
        assert len(data[number]["tokens"]) == LENGTH


def measure_call(body: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return seconds of ``body``, MiB added to the peak and to private memory, and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    resident, private = memory("VmRSS:"), private_memory()
    started = time.monotonic()
    result = body()
    seconds = time.monotonic() - started
    figures = {"seconds": seconds, "peak": (memory("VmHWM:") - resident) / MIB}
    return figures | {"private": (private_memory() - private) / MIB}, result


def memory(name: str) -> int:
    """Return the bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def private_memory() -> int:
    """Return the bytes that this process does not share with other ranks, unlike mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty:"))


def report(found: dict[tuple[str, int], dict[str, float]], args: argparse.Namespace) -> None:
    """Print the table."""
    print(
        f"{TOKENS * args.scale / 1e9:.1f} B tokens, {FOLDS * SOURCES} datasets, {FOLDS} folds, "
        f"sequences of {LENGTH}; median of {args.rounds}"
    )
    head = ("folds", "side", "cold s", "warm s", "next fold s", "cold peak MiB", "private MiB")
    print("  ".join(f"{name:>13}" for name in head))
    for (side, folds), row in found.items():
        edge = f"{row['edge']:.3f}" if row["edge"] else "-"
        numbers = [f"{row['cold']:.2f}", f"{row['warm']:.2f}", edge]
        numbers += [f"{row['cold_peak']:.0f}", f"{row['private']:.1f}"]
        print("  ".join(f"{cell:>13}" for cell in (str(folds), side, *numbers)))


if __name__ == "__main__":
    sys.exit(main())
