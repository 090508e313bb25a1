"""Part ``save``: for how long synchronous and asynchronous saves block training."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu import runs
from benchmarks.gpu.results import Context
from benchmarks.gpu.session import synchronize
from megatron_llmjp.checkpoint.saver import Saver
from megatron_llmjp.config.flags import parse
from megatron_llmjp.estimate.checkpoints import checkpoint_bytes

SAVE_SECONDS = 6.0
"""A checkpoint is chosen that the disk takes in this time."""

PROBE_BYTES = 2**30
STEPS = 4
SAVE_INTERVAL = 2


def measure(context: Context) -> None:
    """Save the same model synchronously, then asynchronously."""
    rate = _disk_rate(context)
    preset, size = _choose(context, rate)
    context.results.note(
        f"{preset}; the disk writes {rate / 1e9:.2f} GB/s; a checkpoint has {size / 1e9:.2f} GB by "
        "--estimate"
    )
    for mode in ("synchronous", "asynchronous"):
        save = context.work / f"save_{mode}"
        with _timed(context) as saves:
            assert runs.train([*_flags(context, preset, save), *_mode_flags(mode)]) == 0
        for number, seconds in enumerate(saves, 1):
            context.results.add(
                "saves",
                {
                    "mode": mode,
                    "save": number,
                    "GB": _bytes(save) / 1e9,
                    "training blocked, s": seconds[0],
                    "complete after, s": seconds[1],
                },
            )
        shutil.rmtree(save)


def _mode_flags(mode: str) -> list[str]:
    return ["--async-save"] if mode == "asynchronous" else []


def _flags(context: Context, preset: str, save: Path) -> list[str]:
    scale = context.scale
    samples = 2 if scale.shrink else 4
    flags = [*scale.shrink, "--bf16", "--micro-batch-size", "1", "--num-workers", "0"]
    flags += ["--global-batch-size", str(samples), "--train-iters", str(STEPS)]
    words = runs.run_flags(
        context, preset, *flags, tokens=2 * STEPS * samples * scale.longest_sample
    )
    words += ["--save", str(save), "--save-interval", str(SAVE_INTERVAL)]
    return [*words, "--keep-last", "1", "--no-save-fold-ends"]


def _disk_rate(context: Context) -> float:
    """Return the bytes per second of a file that is written and synced to disk."""
    path = context.work / "probe"
    block = os.urandom(PROBE_BYTES // 64 if not context.scale.shrink else 2**16)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return 64 * len(block) / seconds


def _choose(context: Context, rate: float) -> tuple[str, int]:
    """Return the first preset whose checkpoints fit the time and, twice, the disk."""
    free = shutil.disk_usage(context.work).free
    presets = context.scale.save_presets
    for preset in presets:
        config = parse(["--config", preset, *context.scale.shrink, "--bf16"]).config
        size = checkpoint_bytes(config)
        if preset == presets[-1] or (size < rate * SAVE_SECONDS and 2.5 * size < free):
            break
    return preset, size


def _bytes(folder: Path) -> int:
    """Return the size of the newest checkpoint."""
    newest = max(folder.glob("iter_*"))
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


@contextmanager
def _timed(context: Context) -> Iterator[list[list[float]]]:
    """Record each save: seconds until training continues, and until the checkpoint is complete.

    The device is idle when a save begins, so that its last step is not counted.
    """
    saves: list[list[float]] = []
    began: list[float] = []
    save, complete = Saver.save, Saver._succeed

    @wraps(save)
    def timed_save(self: Saver, *arguments: Any) -> None:
        synchronize(context)
        self.wait()
        began.append(time.perf_counter())
        saves.append([float("nan"), float("nan")])
        save(self, *arguments)
        saves[-1][0] = time.perf_counter() - began[-1]

    @wraps(complete)
    def timed_completion(self: Saver) -> None:
        saves[-1][1] = time.perf_counter() - began[-1]
        complete(self)

    with (
        mock.patch.object(Saver, "save", timed_save),
        mock.patch.object(Saver, "_succeed", timed_completion),
    ):
        yield saves
