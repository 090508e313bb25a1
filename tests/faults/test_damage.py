"""Damaged checkpoints are skipped with a warning."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from tests.faults.stage import Stage

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def half(stage) -> dict[str, Path]:
    """Save folders of runs that were stopped at iteration 6, by layout."""
    found = {}
    for layout in ("alone", "tp2-async"):
        found[layout] = stage.folder("half")
        code, _, errors = stage.run(layout, found[layout], "--exit-interval", 6)
        assert code == 3, errors
    # Killed after the checkpoint of iteration 6.
    found["killed"] = stage.folder("half")
    die = ("signal_at", signal.SIGKILL, "a step", 6)
    code, _, errors = stage.run("alone", found["killed"], fault=die)
    assert code == -signal.SIGKILL, errors
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
    """Remove half of the files, as after an interrupted ``cp -r``."""
    for path in sorted(folder.rglob("*"))[1::2]:
        if path.is_file():
            path.unlink()


def empty_tracker(folder: Path) -> None:
    (folder.parent / manifests.TRACKER).write_text("")


def garbage_tracker(folder: Path) -> None:
    (folder.parent / manifests.TRACKER).write_bytes(b"\0\xff\0\xff")


def cut_the_index(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-10])


def lose_the_format(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def empty_common(folder: Path) -> None:
    (folder / "common.pt").write_bytes(b"")


def folder_for_a_file(folder: Path) -> None:
    (folder / manifests.FOLDS).unlink()
    (folder / manifests.FOLDS).mkdir()


def edit_the_samples(folder: Path) -> None:
    path = folder / manifests.MANIFEST
    text = path.read_text()
    changed = text.replace('"consumed_samples": 12', '"consumed_samples": 14')
    assert changed != text
    path.write_text(changed)


OUTCOME = (
    "reported with its cause; the newest undamaged checkpoint is used; the same losses and weights"
)
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
    ("layout", "damage", "iteration", "message"),
    [
        pytest.param(c[0], c[2], *c[3:], marks=pytest.mark.fault(f"checkpoint: {c[1]}", OUTCOME))
        for c in CASES
    ],
)
def test_the_newest_undamaged_checkpoint_is_used(
    stage: Stage,
    half: dict[str, Path],
    layout: str,
    damage: Callable[[Path], None],
    iteration: int,
    message: str,
):
    save = stage.folder("damaged")
    shutil.copytree(half[layout], save)
    damage(save / "iter_0000006")
    output, errors = stage.resume_and_prove(layout, save, "--verify-checkpoint")
    assert f"resuming from {save / manifests.folder_name(iteration)}" in output
    assert re.search(message, errors), errors
    assert errors.count("warning: ") == 1


SMALL = [
    ("damaged index", cut_the_index, r"\.metadata has \d+ bytes instead of \d+"),
    ("missing metadata.json", lose_the_format, r"metadata\.json is missing"),
    ("empty common.pt", empty_common, r"common\.pt has 0 bytes instead of"),
    ("folder in place of a file", folder_for_a_file, r"folds\.yaml is not a file"),
    ("edited number of samples", edit_the_samples, "manifest.json: checksum mismatch"),
]


@pytest.mark.parametrize("end", ["alone", "killed"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [pytest.param(*c[1:], marks=pytest.mark.fault(f"checkpoint: {c[0]}", OUTCOME)) for c in SMALL],
)
def test_small_files_are_always_verified(
    stage: Stage,
    half: dict[str, Path],
    end: str,
    damage: Callable[[Path], None],
    message: str,
):
    """After a stop and after a kill."""
    save = stage.folder("damaged")
    shutil.copytree(half[end], save)
    damage(save / "iter_0000006")
    output, errors = stage.resume_and_prove("alone", save)
    assert f"resuming from {save / 'iter_0000004'}" in output
    assert re.search(message, errors), errors
