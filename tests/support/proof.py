"""Comparison of two runs: their losses and weights must be equal."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from tests.support.training import history

LOGGED = ("lm loss", "grad norm", "learning rate", "consumed samples")
VALIDATION = "validation/valid"


def tensors(save: Path, iteration: int | None = None) -> dict:
    """Return all tensors of a checkpoint, including the optimizer; by default of the newest one."""
    from megatron_llmjp.convert.files import torch_dist

    number = iteration if iteration is not None else manifests.complete_iterations(save)[-1]
    entries = torch_dist.read_metadata(save / manifests.folder_name(number))
    return {name: entry.tensor_read(None).read(name) for name, entry in entries.items()}


def assert_equal_runs(save: Path, reference: Path, unfinished: int | None = None) -> None:
    """Assert that logged values and the tensors of the last checkpoint are equal bit for bit.

    The validation at iteration ``unfinished`` may be missing: a stop request ends a validation.
    """
    import torch

    for value in LOGGED:
        assert history(save, value) == history(reference, value), value
    expected, found = (history(folder, VALIDATION) for folder in (reference, save))
    if unfinished not in found:
        expected.pop(unfinished, None)
    assert found == expected
    last = manifests.complete_iterations(reference)[-1]
    assert manifests.complete_iterations(save)[-1] == last
    manifest = manifests.read_manifest(save / manifests.folder_name(last))
    assert (
        manifests.file_problems(save / manifests.folder_name(last), manifest, checksums=True) == []
    )
    expected, found = tensors(reference, last), tensors(save, last)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_checkpoints_complete(save: Path) -> None:
    """Assert that all checkpoint folders are complete, and that the tracker names one of them."""
    iterations = manifests.complete_iterations(save)
    assert len(list(save.glob("iter_*"))) == len(iterations)
    for iteration in iterations:
        folder = save / manifests.folder_name(iteration)
        assert (
            manifests.file_problems(folder, manifests.read_manifest(folder), checksums=True) == []
        )
    tracked, wrong = manifests.read_tracker(save)
    assert wrong == [] and (tracked is None or tracked in iterations)
