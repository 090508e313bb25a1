"""The proof that nothing was lost: the losses and the weights of two runs are equal."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from tests.support.training import history

LOGGED = ("lm loss", "grad norm", "learning rate", "consumed samples")
VALIDATION = "validation/valid"


def tensors(save: Path, iteration: int | None = None) -> dict:
    """All tensors of a checkpoint, those of the optimizer too; of the newest one by default."""
    from megatron_llmjp.convert.files import torch_dist

    number = iteration if iteration is not None else manifests.complete_iterations(save)[-1]
    entries = torch_dist.read_metadata(save / manifests.folder_name(number))
    return {name: entry.layer(None).read(name) for name, entry in entries.items()}


def assert_equal_runs(save: Path, reference: Path, unfinished: int | None = None) -> None:
    """Every number that was logged and every tensor of the last checkpoint, bit for bit.

    The validation of iteration ``unfinished`` may lack: a run that is asked to stop leaves it out.
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
    whole = manifests.read_manifest(save / manifests.folder_name(last))
    assert manifests.file_problems(save / manifests.folder_name(last), whole, checksums=True) == []
    expected, found = tensors(reference, last), tensors(save, last)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_whole(save: Path) -> None:
    """Whatever has a checkpoint's name is whole, and the tracker names none that is not there."""
    iterations = manifests.complete_iterations(save)
    assert len(list(save.glob("iter_*"))) == len(iterations)
    for iteration in iterations:
        folder = save / manifests.folder_name(iteration)
        assert (
            manifests.file_problems(folder, manifests.read_manifest(folder), checksums=True) == []
        )
    tracked, wrong = manifests.read_tracker(save)
    assert wrong == [] and (tracked is None or tracked in iterations)
