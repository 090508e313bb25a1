"""Benchmark: duration of ``run_status`` for many runs.

    python benchmarks/run_status.py --folder /tmp/run_status --runs 300

Each run has a metrics file of 20,000 intervals, 20 checkpoints of 128 ranks, 100 ends of jobs and
the logs of 128 ranks; a tenth of the runs have crashed. Times include the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_llmjp.checkpoint import manifest  # noqa: E402
from megatron_llmjp.config.flags import parse  # noqa: E402
from megatron_llmjp.config.loading import dump_config  # noqa: E402

INTERVALS, CHECKPOINTS, JOBS, RANKS = 20_000, 20, 100, 128


def main() -> int:
    """Write the save folders, and measure a table, a table in JSON and one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder for the runs (1 GB)")
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the table shows medians")
    args = parser.parse_args()
    folders = write_runs(args.folder, args.runs)
    commands: dict[str, list[Any]] = {
        f"table of {args.runs} runs": folders,
        f"JSON of {args.runs} runs": [*folders, "--json"],
        "one run": folders[:1],
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, words in commands.items():
            seconds[name].append(measure(words))
    print("| output | seconds | range | CPU seconds |\n|---|---|---|---|")
    for name, values in seconds.items():
        elapsed, used = zip(*values, strict=True)
        print(
            f"| {name} | {statistics.median(elapsed):.2f} | {min(elapsed):.2f} to "
            f"{max(elapsed):.2f} | {statistics.median(used):.2f} |"
        )
    return 0


def measure(words: list[Any]) -> tuple[float, float]:
    """Return the seconds and CPU seconds of one call."""
    command = [sys.executable, "-m", "data_tools.run_status", *map(str, words)]
    started, used = time.perf_counter(), cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode in (0, 1, 3), done.stderr.decode()
    return time.perf_counter() - started, cpu_seconds() - used


def cpu_seconds() -> float:
    """Return the CPU time of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_runs(folder: Path, runs: int) -> list[Path]:
    """Write one run and copy it, with hard links to its large files."""
    shutil.rmtree(folder, ignore_errors=True)
    first = folder / "run0000"
    write_run(first)
    found = [first]
    for number in range(1, runs):
        found.append(folder / f"run{number:04d}")
        shutil.copytree(first, found[-1], copy_function=os.link)
        if number % 10 == 0:
            (found[-1] / "requeues.jsonl").unlink()
            write_job_ends(found[-1], crashed=True)
    return found


def write_run(save: Path) -> None:
    """Write the save folder of a run that was requeued."""
    save.mkdir(parents=True)
    config = dump_config(parse(["--config", "llm-jp-3-13b"]).config)
    files = {"config.yaml": manifest.FileEntry(bytes=len(config), crc32="0" * 8)}
    for rank in range(RANKS):
        files[f"__{rank}_0.distcp"] = manifest.FileEntry(bytes=1 << 30, crc32="0" * 8)
    folds = "".join(f"- name: fold{number:02d}\n  data: [{{path: a}}]\n" for number in range(11))
    for number in range(1, CHECKPOINTS + 1):
        checkpoint = save / manifest.folder_name(1000 * number)
        checkpoint.mkdir()
        (checkpoint / manifest.CONFIG).write_text(config)
        (checkpoint / manifest.FOLDS).write_text(f"folds:\n{folds}")
        about = {"consumed_samples": 1_024_000 * number, "contents": "full", "files": files}
        manifest.write_manifest(
            checkpoint, manifest.Manifest.model_validate({"iteration": 1000 * number, **about})
        )
    write_metrics(save)
    write_job_ends(save, crashed=False)
    logs = save / "logs" / f"job7_{JOBS - 1}"
    logs.mkdir(parents=True)
    for rank in range(RANKS):
        (logs / f"rank_{rank:04d}.log").write_text(
            "128 process(es) by srun on cuda\n" + 20_000 * "."
        )


def write_metrics(save: Path) -> None:
    """Write the intervals, with the metrics of a run on GPUs."""
    names = ["tokens per second", "TFLOP/s per GPU", "MFU", "learning rate", "grad norm"]
    names += ["params norm", "loss scale", "total skipped iterations", "memory peak bytes"]
    with (save / "metrics.jsonl").open("w") as stream:
        for number in range(1, INTERVALS + 1):
            record: dict[str, Any] = {"iteration": number, "consumed samples": 1024 * number}
            record |= {"lm loss": 2.5, "seconds per iteration": 5.0, "global batch size": 1024}
            record |= {"seconds remaining": 5.0 * (40_000 - number), "fold": "fold03"}
            record |= dict.fromkeys(names, 123.456789)
            record |= {f"dataset loss/corpus{at:02d}": 2.512345 for at in range(12)}
            stream.write(json.dumps(record) + "\n")


def write_job_ends(save: Path, crashed: bool) -> None:
    """Write the ends of all jobs."""
    with (save / "requeues.jsonl").open("w") as stream:
        for restart in range(JOBS):
            last = crashed and restart == JOBS - 1
            record = {"time": "2026-01-02 03:04:05", "job": "7", "restart": restart}
            record |= {"exit code": 1 if last else 3, "iteration": 200 * restart}
            why = "not requeued: no new checkpoint in 3 starts" if last else "stopped on request"
            stream.write(json.dumps({**record, "requeued": not last, "why": why}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
