"""Flags of a run on paper: ``--rehearse``, ``--suggest-layout``, and the machine it is for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.errors import UserError

REHEARSE = "--rehearse"
SUGGEST = "--suggest-layout"


@dataclass(frozen=True)
class Rehearsal:
    """What is asked for, and the machine."""

    suggest: bool
    """Search layouts instead of rehearsing the one that is given."""
    world_size: int
    gpu: str
    gpu_memory: float | None
    """Bytes; None for that of the GPU."""
    gpus_per_node: int
    mfu: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; ``--world-size`` is the parser's own."""
    add = parser.add_argument_group("a run on paper, without GPUs and data").add_argument
    add(
        REHEARSE,
        action="store_true",
        help="print layout, memory, traffic, time and warnings of a run of --world-size processes, "
        "and end; exit code 2 if it cannot run or does not fit",
    )
    add(
        SUGGEST,
        action="store_true",
        help="search the layouts of the model on --world-size GPUs and print the best; the global "
        "batch and sequence length stay",
    )
    add("--gpus", type=int, metavar="N", help="the same as --world-size, for these two")
    add("--gpu", default="H100", metavar="NAME", help="kind of GPU, as A100-40GB (default: H100)")
    add("--gpu-memory", metavar="SIZE", help="memory of a GPU, as 40GB, if not that of its kind")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    add("--mfu", type=float, default=0.38, metavar="X", help="assumed MFU (default: 0.38)")


def asked_for(argv: Sequence[str]) -> Rehearsal | None:
    """What a command line asks for; None for a real run.

    Raises:
        UserError: the number of processes is missing, or a value is none.
    """
    if REHEARSE not in argv and SUGGEST not in argv:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--world-size", type=int)
    given = parser.parse_known_args(argv)[0]
    world_size = given.gpus or given.world_size
    flag = SUGGEST if given.suggest_layout else REHEARSE
    if not world_size or world_size < 1:
        raise UserError(f"{flag} needs --world-size N, the number of GPUs")
    if not 0.0 < given.mfu <= 1.0:
        raise UserError(f"--mfu {given.mfu}: expected a part of the peak, such as 0.38")
    return Rehearsal(
        suggest=given.suggest_layout,
        world_size=world_size,
        gpu=given.gpu,
        gpu_memory=_bytes(given.gpu_memory) if given.gpu_memory else None,
        gpus_per_node=given.gpus_per_node,
        mfu=given.mfu,
    )


def _bytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", text)
    if match is None:
        raise UserError(f"--gpu-memory {text}: expected a size such as 40GB or 80GiB")
    return float(match[1]) * (2**30 if match[2] == "GiB" else 1e9)
