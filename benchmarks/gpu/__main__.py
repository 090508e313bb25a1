"""Measurements on one GPU: losses, resume, speed, memory, host waits, saves.

    make gpu                                            # all parts, under 9 minutes, on one GPU
    python -m benchmarks.gpu --only step-1.8b --only save
    python -m benchmarks.gpu --device cpu --scale tiny  # try the program without a GPU

Every part is a process of its own with a time limit; a part that fails is recorded with its message
and does not end the others. OUTPUT/gpu.json and OUTPUT/gpu.md, the same as tables for
docs/performance.md, are rewritten after each part; OUTPUT/logs has the parts' output. Nothing is
downloaded: data is synthetic.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part, find_part
from benchmarks.gpu.results import NEEDS_GPU, Context, Results, SkippedError, write_json
from benchmarks.gpu.runner import ROOT, SKIPPED_EXIT_CODE, NewSession, Runner, StartFunction
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.table import to_markdown
from megatron_llmjp.parallel.cuda_environment import set_driver_variables

LIMIT_SECONDS = 500.0
"""Under nine minutes, with the installation of wheels before."""

CPU_PATIENCE = 10.0
"""Parts may take so many times longer on a CPU, which may be shared."""

SHORTEST_SECONDS = 10.0
"""A part is not started with less time."""


def main(argv: Sequence[str] | None = None, start: StartFunction = NewSession) -> int:
    """Run the program; returns 0, 1 if a part failed or ran out of time, 2 for a user error."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print("\n".join(f"{p.name:14} {p.title} (at most {p.seconds:.0f} s)" for p in PARTS))
        return 0
    output: Path = arguments.output.resolve()
    for name in ("parts", "logs"):
        (output / name).mkdir(parents=True, exist_ok=True)
    if arguments.run_part:
        return _run_part(arguments, output)
    if not arguments.device and not _has_gpu():
        print(
            "error: torch finds no GPU on this machine. To try the program on a CPU: "
            "--device cpu --scale tiny",
            file=sys.stderr,
        )
        return 2
    chosen = [part for part in PARTS if part.name in (arguments.only or [p.name for p in PARTS])]
    with tempfile.TemporaryDirectory(prefix="work_", dir=output) as work:
        runner = Runner(arguments.device or "cuda", arguments.scale, output, Path(work), start)
        report = _run(runner, chosen, arguments.limit or LIMIT_SECONDS * _patience(runner))
    return 0 if all(p["status"] in ("done", "skipped") for p in report["parts"].values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--only", action="append", choices=names, metavar="PART", help="a part; repeatable")
    add("--list", action="store_true", help="print the parts and exit")
    add(
        "--limit",
        type=float,
        metavar="SECONDS",
        help=f"of all parts (default: {LIMIT_SECONDS:.0f})",
    )
    add("--output", type=Path, default=ROOT / "gpu_results", metavar="DIR")
    add("--device", choices=("cuda", "cpu"), help="default: cuda")
    add("--scale", choices=tuple(SCALES), default="full", help="sizes of the models")
    add("--run-part", help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    return parser


def _run(runner: Runner, chosen: Sequence[Part], limit: float) -> dict[str, Any]:
    """Run the parts in order and rewrite the report after each."""
    began = time.monotonic()
    report: dict[str, Any] = {
        "machine": "an unknown machine",
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": 0.0,
        **_commit(),
        "device": runner.device,
        "scale": runner.scale,
        "parts": {},
    }
    for part in chosen:
        left = limit - (time.monotonic() - began)
        if left < SHORTEST_SECONDS:
            message = f"the limit of {limit:.0f} s was reached (--only {part.name})"
            entry = {
                "title": part.title,
                "status": "time limit",
                "message": message,
                "seconds": 0.0,
            }
        else:
            print(f"{part.name}: {part.title} ...", flush=True)
            entry = runner.run(part, min(part.seconds * _patience(runner), left))
        report["parts"][part.name] = entry
        report["machine"] = _machine(report["parts"])
        report["seconds"] = round(time.monotonic() - began, 1)
        write_json(runner.folder / "gpu.json", report)
        (runner.folder / "gpu.md").write_text(to_markdown(report), encoding="utf-8")
        print(f"  {entry['status']} in {entry['seconds']:.0f} s {entry['message']}", flush=True)
    print(f"wrote {runner.folder / 'gpu.json'} and gpu.md")
    return report


def _patience(runner: Runner) -> float:
    return CPU_PATIENCE if runner.device == "cpu" else 1.0


def _run_part(arguments: argparse.Namespace, output: Path) -> int:
    """Run one part in this process."""
    name, device = arguments.run_part, arguments.device or "cuda"
    part, results = find_part(name), Results(output / "parts" / f"{name}.json")
    if device == "cuda" and not _has_gpu():
        print("torch finds no GPU")
        return SKIPPED_EXIT_CODE
    try:
        part.run(Context(device, SCALES[arguments.scale], arguments.work, results))
    except SkippedError as reason:
        print(reason)
        return SKIPPED_EXIT_CODE
    return 0


def _machine(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the name of the machine, from the facts that its part found."""
    rows = parts.get("machine", {}).get("tables", {}).get("machine", ())
    facts = {row["fact"]: row["value"] for row in rows if row["value"] != NEEDS_GPU}
    names = ("GPU", "driver_version", "CPU", "torch")
    found = [f"{name.partition('_')[0]} {facts[name]}" for name in names if name in facts]
    return ", ".join(found) if found else "an unknown machine"


def _commit() -> dict[str, Any]:
    """Return the commit, and whether the source differs from it."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "uncommitted changes": False}
    return {"commit": commit, "uncommitted changes": bool(changes)}


def _has_gpu() -> bool:
    set_driver_variables()
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
