"""Benchmark: saving and loading a checkpoint, compared with raw disk speed for the same bytes.

    python benchmarks/checkpoint.py --folder /scratch/benchmark --rounds 5

One process and a GPT of 0.54 B parameters in fp32 (2.1 GB of weights; with ``--with-optimizer`` the
two moments of Adam, 6.4 GB, which needs 20 GB of memory). Each round writes the same number of
bytes three times: raw, with consecutive ``write`` calls and an ``fsync`` like ``dd conv=fsync``; as
a synchronous save; as an asynchronous save. Then it reads them twice, after dropping the page cache
of the files: raw, and as a load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 16 << 20
MODEL = (
    "--num-layers 8 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 "
    "--vocab-size 32000 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 1 "
    "--tokenizer-type NullTokenizer --save unused --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --normalization RMSNorm "
    "--hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02 --lr 1e-4 --min-lr 1e-5 "
    "--lr-decay-style cosine --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 "
    "--train-iters 1000 --global-batch-size 1 --seed 1234"
)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--with-optimizer", action="store_true", help="also save Adam's state")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        measure(arguments.folder, arguments.rounds, arguments.with_optimizer)
    finally:
        shutil.rmtree(arguments.folder)


def measure(folder: Path, rounds: int, with_optimizer: bool) -> None:
    """Run all rounds and print the table."""
    from megatron_llmjp.checkpoint import sharded_state
    from megatron_llmjp.checkpoint.save import RunDescription, SaveProgress
    from megatron_llmjp.checkpoint.saver import FoldEnds, Saver
    from megatron_llmjp.config.loading import replace_fields

    config, state = make_state(with_optimizer)
    savers = {}
    for kind in ("sync", "async"):
        own = replace_fields(config, save=str(folder / kind), async_save=kind == "async")
        savers[kind] = Saver(RunDescription(own), FoldEnds(), lambda: None, 0)
    times: dict[str, list[float]] = {}
    size = 0
    for number in range(1, rounds + 1):
        progress = SaveProgress(number, number)
        if not size:  # warm-up: the first asynchronous save allocates its buffers
            for saver in savers.values():
                saver.save(state, progress)
                saver.wait()
            size = sum(path.stat().st_size for path in files(folder / "sync"))
        take(times, "raw write", raw_write, folder / "raw", size)
        take(times, "synchronous save", savers["sync"].save, state, progress)
        take(times, "asynchronous save", save_and_wait, savers["async"], state, progress, times)
        saved = folder / "sync" / f"iter_{number:07d}"
        drop_page_cache(folder)
        take(times, "raw read", raw_read, folder / "raw")
        drop_page_cache(folder)
        take(times, "load", sharded_state.load_checkpoint, saved, state)
        for kind in savers:
            shutil.rmtree(folder / kind)
        print(f"round {number}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()))
    report(times, size)


def take(
    times: dict[str, list[float]], name: str, action: Callable[..., Any], *arguments: Any
) -> None:
    """Time a call and record it."""
    started = time.perf_counter()
    action(*arguments)
    times.setdefault(name, []).append(time.perf_counter() - started)


def save_and_wait(saver: Any, state: Any, progress: Any, times: dict[str, list[float]]) -> None:
    """Run an asynchronous save until it is published; record its stall separately."""
    take(times, "stall of asynchronous save", saver.save, state, progress)
    saver.wait()


def make_state(with_optimizer: bool) -> tuple[Any, Any]:
    """Return a configuration, and the state of a run before its first step."""
    from megatron_llmjp.checkpoint.sharded_state import RunState
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process
    from megatron_llmjp.training.optimizer import build_optimizer, wrap_for_data_parallel

    config = parse(MODEL.split()).config
    device = setup()
    process_groups.initialize(config, single_process(), device)
    chunks = build_model(config, device)
    if not with_optimizer:
        return config, RunState(chunks)
    chunks = wrap_for_data_parallel(chunks, config)
    return config, RunState(chunks, build_optimizer(chunks, config), NoSchedule())


class NoSchedule:
    """Learning-rate scheduler without state."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""


def files(folder: Path) -> Iterator[Path]:
    """Return all files below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def raw_write(path: Path, size: int) -> None:
    """Write ``size`` bytes to a new file and fsync it."""
    path.unlink(missing_ok=True)
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as stream:
        for start in range(0, size, BLOCK):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())


def raw_read(path: Path) -> None:
    """Read a whole file."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def drop_page_cache(folder: Path) -> None:
    """Drop the page cache of all files in a folder, so that reads access the disk."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def report(times: dict[str, list[float]], size: int) -> None:
    """Print medians over the rounds, and the fraction of the raw speed in each round."""
    print(f"\n{size / 1e9:.2f} GB, median of {len(times['load'])} rounds")
    print(f"{'':28} {'seconds':>8} {'MB/s':>6}  of raw, per round: median (min to max)")
    for name, values in times.items():
        middle = statistics.median(values)
        line = f"{name:28} {middle:8.2f}"
        if "stall" not in name:
            line += f" {size / middle / 1e6:6.0f}"
            raw = times["raw read" if name in {"load", "raw read"} else "raw write"]
            if values is not raw:
                shares = [r / v for r, v in zip(raw, values, strict=True)]
                line += (
                    f"  {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
                )
        print(line)


if __name__ == "__main__":
    main()
