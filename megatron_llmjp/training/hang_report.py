"""Where the ranks of a run stand when it hangs, and which of them to look at first."""

from __future__ import annotations

import socket
import sys
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_WAITS_FOR_OTHERS = (
    "torch/distributed/",
    "p2p_communication.py",
    "param_and_grad_buffer.py",
    "megatron_llmjp/runtime/distributed.py",
    "megatron_llmjp/training/guard.py",
)
"""Files whose functions wait for other ranks."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    rank: int
    host: str
    iteration: int
    phase: str
    """What it was about to do: a step, a validation, a save."""
    line: str
    """The innermost line of Python of its main thread."""
    waits: bool
    """Whether that line is inside a collective, hence waits for another rank."""


def place_of(thread: int, rank: int, iteration: int, phase: str) -> Place:
    """Where a thread of this process stands."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    inner = frames[-1]
    own = next((f for f in reversed(frames) if "megatron" in f.filename), inner)
    return Place(
        rank,
        socket.gethostname(),
        iteration,
        phase,
        f"{_short(own.filename)}:{own.lineno} in {own.name}",
        waits_for_others([frame.filename for frame in frames]),
    )


def waits_for_others(files: list[str]) -> bool:
    """Whether a stack of these files, innermost last, is inside a collective."""
    return any(part in name for name in files[-4:] for part in _WAITS_FOR_OTHERS)


def files_of(frame: FrameType | None) -> list[str]:
    """Files of a stack, innermost last; reads no source, so it is cheap."""
    names = []
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names[::-1]


def blame(places: list[Place], world_size: int) -> list[str]:
    """Which ranks to look at, from the places of those that answer; a line for each group."""
    answered = {place.rank for place in places}
    silent = [rank for rank in range(world_size) if rank not in answered]
    lines = []
    if silent:
        lines.append(f"{_ranks(silent)}: no answer (stopped, gone, or its machine is)")
    groups: dict[tuple[int, str, str, bool], list[Place]] = defaultdict(list)
    for place in places:
        groups[place.iteration, place.phase, place.line, place.waits].append(place)
    # Those behind come first, then those that are busy with something of their own.
    for key in sorted(groups, key=lambda k: (k[0], k[3])):
        lines.append(_describe(groups[key]))
    if not silent and len(groups) > 1:
        lines[0] += "   <- look here first"
    return lines


def blame_first_rank(own: Place) -> list[str]:
    """The same where the store does not answer: the first rank holds it."""
    return [
        "rank 0: no answer (stopped, gone, or its machine is); the other ranks cannot be asked "
        "without it   <- look here first",
        _describe([own]),
    ]


def _describe(members: list[Place]) -> str:
    """A line for ranks that stand at the same place."""
    one = members[0]
    hosts = ", ".join(sorted({place.host for place in members})[:4])
    what = "waits for other ranks" if one.waits else "does not wait for another rank"
    return (
        f"{_ranks([p.rank for p in members])} on {hosts}: iteration {one.iteration}, {one.phase}; "
        f"{what}; {one.line}"
    )


def _ranks(ranks: list[int]) -> str:
    """``ranks 0-3, 8``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _short(filename: str) -> str:
    """A file's path from its package on."""
    parts = Path(filename).parts
    at = max((i for i, part in enumerate(parts) if part.startswith("megatron")), default=0)
    return "/".join(parts[at:] if at else parts[-2:])
