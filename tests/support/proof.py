"""Comparison of two runs: their losses and weights must be equal.

Checkpoints are read by torch and by the functions of :mod:`tests.support.witness`.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.training import history
from tests.support.witness import assert_files_match_manifest, read_tensors

LOGGED = ("lm loss", "grad norm", "learning rate", "consumed samples")
VALIDATION = "validation/valid"


def complete_iterations(save: Path) -> list[int]:
    """Return the iterations of all folders with a manifest, ascending."""
    return sorted(int(path.parent.name[5:]) for path in save.glob("iter_*/manifest.json"))


def tensors(save: Path, iteration: int | None = None) -> dict:
    """Return all tensors of a checkpoint, including the optimizer; by default of the newest one."""
    number = iteration if iteration is not None else complete_iterations(save)[-1]
    return read_tensors(save / f"iter_{number:07d}")


def assert_equal_runs(save: Path, reference: Path, unfinished: int | None = None) -> None:
    """Assert that logged values and the tensors of the last checkpoint are equal bit for bit.

    The validation at iteration ``unfinished`` may be missing: a stop request ends a validation.
    """
    import torch

    for value in LOGGED:
        expected, found = (history(folder, value) for folder in (reference, save))
        assert expected and found == expected, value
    expected, found = (history(folder, VALIDATION) for folder in (reference, save))
    if unfinished not in found:
        expected.pop(unfinished, None)
    assert found == expected
    last = complete_iterations(reference)[-1]
    assert complete_iterations(save)[-1] == last
    assert_files_match_manifest(save / f"iter_{last:07d}")
    expected, found = tensors(reference, last), tensors(save, last)
    assert expected and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_checkpoints_complete(save: Path) -> None:
    """Assert that all checkpoint folders are complete, and that the tracker names one of them."""
    iterations = complete_iterations(save)
    assert len(list(save.glob("iter_*"))) == len(iterations)
    for iteration in iterations:
        content = assert_files_match_manifest(save / f"iter_{iteration:07d}")
        assert content["iteration"] == iteration
    tracker = save / "latest_checkpointed_iteration.txt"
    if tracker.exists():  # a kill before its first write leaves none
        assert int(tracker.read_text()) in iterations
