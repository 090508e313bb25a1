"""Failing saves: reported with their cause, and training continues."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.run_lock import RECORD
from tests.faults.stage import LAST
from tests.support.training import history

pytestmark = pytest.mark.long

OUTCOME = (
    "the cause is reported, training continues, the next save succeeds; the same losses and weights"
)
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Mount a disk of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fault(name: str):
    return pytest.mark.fault(f"{name} while saving", OUTCOME)


@pytest.mark.parametrize(
    ("layout", "kind", "cause"),
    [
        pytest.param("alone", "file size", "File too large", marks=fault("file-size limit")),
        pytest.param("alone-async", "file size", "File too large", marks=fault("file-size limit")),
        pytest.param("dp2", "file size", "File too large", marks=fault("file-size limit")),
        pytest.param("alone", "quota", "quota exceeded", marks=fault("quota")),
        pytest.param("alone-async", "quota", "quota exceeded", marks=fault("quota")),
        pytest.param(
            "alone", "read-only", "Permission denied", marks=[fault("read-only folder"), ROOT_ONLY]
        ),
    ],
)
def test_a_failing_save(stage, layout, kind, cause):
    save = stage.folder("obstructed")
    run_with_failing_save(stage, save, layout, kind, cause, "")
    stage.prove(layout, save)


@pytest.mark.parametrize("layout", ["alone", "alone-async"])
@pytest.mark.fault("disk full while saving, log on the same disk", OUTCOME)
def test_a_full_disk(stage, small_disk, layout):
    """A full disk that also contains the log."""
    save = small_disk / "save"
    run_with_failing_save(
        stage, save, layout, "disk full", "No space left on device", str(small_disk)
    )
    stage.prove(layout, save)


@pytest.mark.fault("folder deleted during the run", "recreated, with a warning; training continues")
@pytest.mark.parametrize("layout", ["alone-async", "dp2"])
def test_a_deleted_folder(stage, layout):
    save = stage.folder("deleted")
    code, _, errors = stage.run(layout, save, fault=("delete_folder_at", str(save), 6))
    assert code == 0, errors
    assert "was deleted or damaged during the run and is recreated" in errors
    assert "Traceback" not in errors
    assert manifests.complete_iterations(save) == [9, LAST]
    reference = history(stage.reference(layout))
    assert history(save) == {i: loss for i, loss in reference.items() if i > 6}
    assert not (save / RECORD).exists()


@pytest.mark.fault("folder taken by another run", "the first run ends before saving; exit code 1")
@pytest.mark.parametrize("layout", ["alone-async", "dp2"])
def test_a_folder_taken_by_another_run(stage, layout):
    save = stage.folder("taken")
    code, _, errors = stage.run(layout, save, fault=("take_folder_at", str(save), 4))
    assert code == 1, errors
    assert errors.count(f"error: --save {save} was acquired by process ") == 1
    assert "on node07" in errors and "Traceback" not in errors
    assert manifests.complete_iterations(save) == [3, 4][: 1 + (layout == "dp2")]
    assert (save / RECORD).exists()  # of the other run


@pytest.mark.fault("stale handle at the start", "retried, then reported; exit code 1")
@pytest.mark.parametrize("layout", ["dp2"])
def test_a_file_system_that_does_not_respond(stage, layout):
    save = stage.folder("stale")
    code, _, errors = stage.run(layout, save, fault=("failing_lock", errno.ESTALE))
    assert code == 1, errors
    said = f"error: --save {save}: not writable: {os.strerror(errno.ESTALE)}"
    assert errors.count(said) == 1
    assert "in use by another run" not in errors and "Traceback" not in errors


def run_with_failing_save(
    stage, save: Path, layout: str, kind: str, cause: str, place: str
) -> None:
    """Assert that only the save of iteration 3 fails, with its cause reported."""
    fault = ("failing_save", kind, 3, place)
    code, output, errors = stage.run(layout, save, fault=fault)
    assert code == 0, errors
    assert errors.count("error: the checkpoint of iteration 3 was not saved: ") == 1
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert cause in error and str(save) in error and "Training continues" in error
    assert "Traceback" not in errors
    assert output.count("saved checkpoint ") == 4
    assert manifests.complete_iterations(save) == [4, 6, 9, LAST]
    assert not list(save.glob(".iter_*"))
