"""Checkpoints that were damaged after they were saved: passed over, and said so."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from tests.faults.stage import Stage


@pytest.fixture(scope="module")
def half(stage) -> dict[str, Path]:
    """Runs that stopped at iteration 6, by their layouts."""
    found = {}
    for layout in ("alone", "tp2-async"):
        found[layout] = stage.folder("half")
        code, _, errors = stage.run(layout, found[layout], "--exit-interval", 6)
        assert code == 3, errors
    return found


def tensors_of(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    os.truncate(tensors_of(folder), tensors_of(folder).stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    contents = bytearray(tensors_of(folder).read_bytes())
    contents[len(contents) // 3] ^= 4
    tensors_of(folder).write_bytes(contents)


def lose(folder: Path) -> None:
    tensors_of(folder).unlink()


def copy_half(folder: Path) -> None:
    """As ``cp -r`` leaves it that was interrupted."""
    for path in sorted(folder.rglob("*"))[1::2]:
        if path.is_file():
            path.unlink()


def empty_tracker(folder: Path) -> None:
    (folder.parent / manifests.TRACKER).write_text("")


def garbage_tracker(folder: Path) -> None:
    (folder.parent / manifests.TRACKER).write_bytes(b"\0\xff\0\xff")


HOW = "said what and why; the newest good one is taken; the same losses and weights"
CASES = [
    ("alone", "truncated file", truncate, 4, r"\.distcp has \d+ bytes instead of \d+"),
    ("tp2-async", "truncated file", truncate, 4, r"\.distcp has \d+ bytes instead of \d+"),
    ("alone", "flipped bit", flip_a_bit, 4, "does not have the checksum of its manifest"),
    ("tp2-async", "flipped bit", flip_a_bit, 4, "does not have the checksum of its manifest"),
    ("alone", "missing file", lose, 4, r"\.distcp is missing"),
    ("alone", "half-copied folder", copy_half, 4, "iter_0000006.* is missing|not here whole"),
    ("alone", "empty tracker", empty_tracker, 6, "is empty"),
    ("alone", "garbage tracker", garbage_tracker, 6, "instead of an iteration"),
]


@pytest.mark.parametrize(
    ("layout", "damage", "iteration", "said"),
    [
        pytest.param(c[0], c[2], *c[3:], marks=pytest.mark.fault(f"checkpoint: {c[1]}", HOW))
        for c in CASES
    ],
)
def test_the_newest_good_one_is_taken(
    stage: Stage,
    half: dict[str, Path],
    layout: str,
    damage: Callable[[Path], None],
    iteration: int,
    said: str,
):
    save = stage.folder("damaged")
    shutil.copytree(half[layout], save)
    damage(save / "iter_0000006")
    output, errors = stage.resume_and_prove(layout, save, "--verify-checkpoint")
    assert f"going on from {save / manifests.folder_name(iteration)}" in output
    assert re.search(said, errors), errors
    assert errors.count("warning: ") == 1
