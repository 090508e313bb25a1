"""Part ``curves``: losses of small models on the GPU against the same runs on the CPU.

Both start from one checkpoint, which the CPU writes: initial weights are drawn on the device and
differ between devices. The reference is always the fp32 run on the CPU; a process of its own
trains it meanwhile (``references``), since a process uses one device.
"""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu import runs
from benchmarks.gpu.results import Context, write_json
from benchmarks.gpu.scale import ARCHITECTURES

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}
"""Largest relative difference of a loss, by precision."""

INIT_STD = "0.05"
DOCUMENT_TOKENS = 16
"""Large initial weights and short documents: attention across documents changes the loss."""

FAILED = "references.failed"
"""File in the work folder with the error of the references."""


@dataclass(frozen=True)
class Curve:
    """One run."""

    architecture: str
    precision: str
    layers: str
    """``torch`` or ``TE``."""
    reset_mask: bool

    @property
    def name(self) -> str:
        """Name of its folder."""
        mask = "reset" if self.reset_mask else "causal"
        return f"{self.architecture}_{self.precision}_{self.layers}_{mask}"

    @property
    def reference(self) -> Curve:
        """The run on the CPU that it is compared with."""
        return Curve(self.architecture, "fp32", "torch", self.reset_mask)


def measure(context: Context) -> None:
    """Train every curve and compare it with its reference."""
    layers = runs.installed_layers(context)
    rows = [_add_row(context, curve) for curve in curves(context, layers)]
    agreed = sum(row["agreed"] == "yes" for row in rows)
    context.results.note(f"{agreed} of {len(rows)} agreed")
    if agreed < len(rows):
        raise RuntimeError(f"{len(rows) - agreed} of {len(rows)} did not agree")


def curves(context: Context, layers: tuple[str, ...]) -> list[Curve]:
    """Return all runs on the GPU, those with torch's layers first."""
    return [
        Curve(architecture, precision, layer, reset)
        for layer in layers
        for architecture in context.scale.architectures
        for precision in TOLERANCES
        for reset in (False, True)
    ]


def train_references(context: Context) -> None:
    """On the CPU: write the checkpoints that all runs start from, then train the references."""
    try:
        _train_references(context)
    except BaseException as error:
        (context.work / FAILED).write_text(f"{type(error).__name__}: {error}")
        raise


def _train_references(context: Context) -> None:
    for architecture in context.scale.architectures:
        start = _start_folder(context, architecture)
        words = _flags(context, Curve(architecture, "fp32", "torch", False), start)
        temporary = start.with_name(f"{start.name}.writing")
        words += ["--save", str(temporary), "--train-iters", "1", "--lr-warmup-iters", "0"]
        # The least iterations that can be saved; the learning rate leaves the weights as they are.
        assert runs.train([*words, "--lr", "1e-30", "--min-lr", "0"]) == 0
        temporary.rename(start)
    for curve in dict.fromkeys(curve.reference for curve in curves(context, ("torch",))):
        found = _train(context, curve, "references")
        write_json(_reference_file(context, curve), found)


def _add_row(context: Context, curve: Curve) -> dict[str, object]:
    row = _row(context, curve)
    context.results.add("losses", row)
    return row


def _row(context: Context, curve: Curve) -> dict[str, object]:
    row: dict[str, object] = {
        "architecture": curve.architecture,
        "precision": curve.precision,
        "layers": curve.layers,
        "attention mask": "reset" if curve.reset_mask else "causal",
    }
    try:
        _wait_for(context, _start_folder(context, curve.architecture))
        found = _train(context, curve, "curves")
        _wait_for(context, _reference_file(context, curve.reference))
    except Exception as error:
        traceback.print_exc()
        return {**row, "agreed": f"failed: {type(error).__name__}: {error}"[:300]}
    expected = _reference(context, curve.reference)
    row |= compare(found, expected, TOLERANCES[curve.precision])
    if curve.reset_mask:
        causal = _reference(context, replace(curve.reference, reset_mask=False))
        row["effect of the mask"] = _largest_difference(causal, expected)
    return row


def _wait_for(context: Context, path: Path) -> None:
    """Wait until the references have written a file; the part's time limit ends the wait."""
    failed = context.work / FAILED
    while not path.exists():
        if failed.exists():
            raise RuntimeError(f"the references on the CPU failed: {failed.read_text()}")
        time.sleep(0.05)


def compare(found: list[float], expected: list[float], tolerance: float) -> dict[str, object]:
    """Compare two curves; the difference is relative, the largest over all steps."""
    difference = _largest_difference(found, expected)
    return {
        "steps": len(expected),
        "first loss": expected[0],
        "last loss": expected[-1],
        "largest difference": difference,
        "tolerance": tolerance,
        "agreed": "yes" if difference <= tolerance else "NO",
    }


def _largest_difference(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference; NaN if any is."""
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return max(differences, key=lambda difference: (difference != difference, difference))


def _reference(context: Context, curve: Curve) -> list[float]:
    losses: list[float] = json.loads(_reference_file(context, curve).read_text())
    return losses


def _train(context: Context, curve: Curve, folder: str) -> list[float]:
    save = context.work / folder / curve.name
    words = _flags(context, curve, save)
    words += ["--train-iters", str(context.scale.curve_steps), "--finetune"]
    words += ["--load", str(_start_folder(context, curve.architecture))]
    assert runs.train(words) == 0
    return runs.losses(save)


def _flags(context: Context, curve: Curve, save: Path) -> list[str]:
    samples = 8 * (context.scale.curve_steps + 1)
    words = runs.run_flags(
        context,
        ARCHITECTURES[curve.architecture],
        *context.scale.small_model,
        *("--hidden-dropout", "0", "--attention-dropout", "0", "--num-workers", "0"),
        *("--init-method-std", INIT_STD),
        tokens=2000 * samples,
        document=DOCUMENT_TOKENS,
    )
    words += ["--save", str(save), *runs.layer_flags(curve.layers)]
    words += ["--bf16"] if curve.precision == "bf16" else []
    return [*words, "--reset-attention-mask"] if curve.reset_mask else words


def _start_folder(context: Context, architecture: str) -> Path:
    return context.work / f"start_{architecture}"


def _reference_file(context: Context, curve: Curve) -> Path:
    return context.work / f"reference_{curve.name}.json"
