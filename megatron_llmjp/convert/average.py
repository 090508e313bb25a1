"""Average of several checkpoints of a run (``--average``), computed while tensors are copied.

The mean, or the exponential moving average of the checkpoints in the order of their iterations:
``a_1 = x_1, a_k = decay * a_(k-1) + (1 - decay) * x_k``, as
``torch.optim.swa_utils.get_ema_avg_fn``. The weights are averaged, nothing else: Adam's moments
belong to the trajectory of one set of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.convert.computed_tensor import computed_read
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import dtype_name
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.verification.model_differences import model_differences
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch


def average_weights(count: int, decay: float | None) -> list[float]:
    """Return the weight of each checkpoint, oldest first; their sum is 1.

    Args:
        count: number of checkpoints.
        decay: decay of the exponential moving average; None for the mean.
    """
    if decay is None:
        return [1.0 / count] * count
    return [
        decay ** (count - 1 - k) * (1.0 if k == 0 else 1.0 - decay)  # the first one is a_1
        for k in range(count)
    ]


def average_checkpoints(
    sources: Sequence[SourceCheckpoint], decay: float | None, dtype: DType | None
) -> SourceCheckpoint:
    """Return a checkpoint whose tensors are averages; its metadata are those of the last one.

    Sums are accumulated in fp32 for 16-bit weights and in fp64 for fp32, and rounded once to the
    stored type, or to fp32 if another type is requested.

    Args:
        sources: the checkpoints, sorted by iteration if all have one.
        decay: decay of the exponential moving average; None for the mean.
        dtype: the requested type of the output.

    Raises:
        UserError: there are fewer than two checkpoints, one is given twice, or they differ in
            architecture, shapes or types.
    """
    ordered = _in_order(sources)
    first, last = ordered[0], ordered[-1]
    for other in ordered[1:]:
        _check_same_model(first, other)
    weights = average_weights(len(ordered), decay)
    reads = {
        name: _average([source.reads[name] for source in ordered], name, weights, dtype)
        for name in first.reads
    }
    kind = "mean" if decay is None else f"exponential moving average (decay {decay:g})"
    shown = ", ".join(
        f"{_title(source)} x {weight:.4g}" for source, weight in zip(ordered, weights, strict=True)
    )
    notes = [
        f"{kind} of {len(ordered)} checkpoints: {shown}",
        "an average has weights only, no optimizer state: train from it with --finetune. "
        f"Iteration, consumed samples, configuration and tokenizer are those of {_title(last)}",
    ]
    layout = f"{kind} of {len(ordered)} checkpoints, weights only"
    return replace(last, reads=reads, layout=layout, optimizer=None, notes=[*last.notes, *notes])


def _title(source: SourceCheckpoint) -> str:
    return source.path.name if source.iteration is None else f"iteration {source.iteration}"


def _in_order(sources: Sequence[SourceCheckpoint]) -> list[SourceCheckpoint]:
    """Return the checkpoints by iteration, or as given if one has none.

    Raises:
        UserError: there are fewer than two, or one is given twice.
    """
    if len(sources) < 2:
        raise UserError("--average: expected at least two checkpoints")
    seen: set[Path] = set()
    for source in sources:
        place = source.path.resolve()
        if place in seen:
            raise UserError(f"--average: {source.path} is given twice")
        seen.add(place)
    if any(source.iteration is None for source in sources):
        return list(sources)
    return sorted(sources, key=lambda source: source.iteration or 0)


def _check_same_model(first: SourceCheckpoint, other: SourceCheckpoint) -> None:
    """Check that two checkpoints have the same tensors.

    Raises:
        UserError: architecture, shapes or types differ.
    """
    pair = f"--average: {first.path} and {other.path}"
    differences = model_differences(first.model, other.model)
    if differences:
        shown = ", ".join(f"{name} {a} / {b}" for name, (a, b) in differences.items())
        raise UserError(f"{pair} are different models: {shown}")
    for name, read in first.reads.items():
        found = other.reads[name]
        if found.shape != read.shape:
            raise UserError(f"{pair}: {name} has shape {read.shape} / {found.shape}")
        if found.dtype != read.dtype:
            raise UserError(
                f"{pair}: {name} has type {dtype_name(read.dtype)} / {dtype_name(found.dtype)}; "
                "convert one with --dtype first"
            )


def _average(
    reads: Sequence[TensorRead],
    name: str,
    weights: Sequence[float],
    dtype: DType | None,
) -> TensorRead:
    stored = reads[0].dtype
    total = DType.float64 if stored.itemsize >= 4 else DType.float32
    result = stored if dtype in (None, stored) else DType.float32
    compute = partial(_weighted_sum, reads, name, weights, total, result)
    return computed_read(reads, result, total, compute)


def _weighted_sum(
    reads: Sequence[TensorRead],
    name: str,
    weights: Sequence[float],
    total: DType,
    result: DType,
) -> torch.Tensor:
    """Read one tensor after the other and return their weighted sum.

    Equal weights are applied to the sum: the sum of a few values is mostly exact.
    """
    is_mean = len(set(weights)) == 1
    found = reads[0].read(name).to(total.torch)
    if not is_mean:
        found.mul_(weights[0])
    for read, weight in zip(reads[1:], weights[1:], strict=True):
        found.add_(read.read(name), alpha=1.0 if is_mean else weight)
    return (found.div_(len(reads)) if is_mean else found).to(result.torch)
