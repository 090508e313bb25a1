"""Many training runs in one set of processes, to pay the start-up cost once."""

from __future__ import annotations

import importlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.parallel.launcher import free_port
from tests.support.forks import run_to_exit
from tests.support.mutations import mutated
from tests.support.processes import run_ranks
from tests.support.recorded import recorded
from tests.support.timeouts import PROCESS_TIMEOUT

SMALL = {
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": 100,
    "--hidden-size": 32,
    "--ffn-hidden-size": 64,
    "--seq-length": 32,
    "--global-batch-size": 4,
    "--micro-batch-size": 1,
    "--lr": 2e-3,
    "--min-lr": 2e-4,
    "--lr-warmup-iters": 2,
    "--log-interval": 1,
    "--eval-iters": 1,
    "--num-workers": 0,
    "--tensorboard-dir": "",
}
"""Flags of a run of one second, for the datasets of :mod:`tests.support.datasets`."""

TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
VP2 = ("--virtual-pipeline-model-parallel-size", 2)
SP = ("--sequence-parallel",)
DISTRIBUTED = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")


@dataclass(frozen=True)
class Job:
    """One training run: name, ranks, and flags in addition to :data:`SMALL`."""

    name: str
    ranks: tuple[int, int]
    """Half-open range of ranks."""
    flags: tuple[Any, ...]
    mutation: str | None = None
    """A mutation of :mod:`tests.support.mutations` to apply."""
    samples: str | None = None
    """An ``.npz`` file of samples for :mod:`tests.support.recorded`."""


def arguments(preset: str, fold_file: Path, *flags: Any, **small: Any) -> list[str]:
    """Return the command line of a small run of a preset."""
    values = {**SMALL, **{f"--{k.replace('_', '-')}": v for k, v in small.items()}}
    words = ["--config", preset, "--fold-file", fold_file, "--no-report"]
    words += [word for flag, value in values.items() if value != "" for word in (flag, value)]
    return [str(word) for word in [*words, *flags]]


def train_all(
    jobs: list[Job], world_size: int, folder: Path, timeout: float = PROCESS_TIMEOUT
) -> None:
    """Run all jobs, in order on each rank; each saves to ``folder/NAME``."""
    plain = [{**asdict(job), "flags": [str(flag) for flag in job.flags]} for job in jobs]
    run_ranks(train_in_forks, world_size, plain, str(folder), timeout=timeout)


def train_in_forks(jobs: list[dict[str, Any]], folder: str) -> None:
    """Run each job of this rank in a process of its own.

    Process groups of earlier runs in a process keep their threads, which then take most of the time
    of forty runs.
    """
    importlib.import_module("megatron_llmjp.training.train")
    for job in jobs:
        if not is_part(job):
            continue
        if (child := os.fork()) == 0:
            run_to_exit(train_on_rank, [job], folder)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, f"job {job['name']}: exit code {code}"


def is_part(job: dict[str, Any]) -> bool:
    """Return whether this rank is one of a job's."""
    first, end = job["ranks"]
    return bool(first <= int(os.environ["RANK"]) < end)


def train_on_rank(jobs: list[dict[str, Any]], folder: str) -> None:
    """Run all jobs of this rank."""
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks
    from megatron_llmjp.run import resolve_run
    from megatron_llmjp.training.train import train

    device = setup()
    me = int(os.environ["RANK"])
    for job in jobs:
        if not is_part(job):
            continue
        first, end = job["ranks"]
        save = Path(folder) / job["name"]
        config = parse([*job["flags"], "--save", str(save)]).config
        run = resolve_run(config, end - first)
        port = rendezvous_port(save.with_suffix(".port"), me == first)
        ranks = Ranks(me - first, end - first, 0, "127.0.0.1", port, "test")
        try:
            with mutated(job["mutation"]), recorded(job["samples"]):
                code = train(run, ranks, device)
        except Exception as error:
            raise AssertionError(f"job {job['name']}: {error}") from error
        assert code == 0, job["name"]


def rendezvous_port(file: Path, choose: bool) -> str:
    """Return a port, chosen by the first rank of a job just before it listens."""
    if choose:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(str(free_port()))
        temporary.replace(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def history(save: Path, value: str = "lm loss") -> dict[int, float]:
    """Return a logged metric of a run, by iteration."""
    records = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return {r["iteration"]: r[value] for r in records if value in r}
