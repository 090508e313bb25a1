"""What limits a run on a number of GPUs: the terms of its step time that cost most GPU time."""

from __future__ import annotations

from megatron_llmjp.estimate.run_estimate import RunEstimate
from megatron_llmjp.estimate.speed.step_time import TERMS

OVERHEADS = ("bubble", "tensor", "context", "pipeline", "data", "stragglers", "optimizer")
"""Terms that are not computing."""
MIN_GROWTH = 0.02
"""Smallest growth of the GPU time per sample that is reported, as a fraction of all GPU time."""
SHOWN = 2
"""Number of growing terms that are named."""


def largest_overhead(estimate: RunEstimate) -> str:
    """Name the largest term that is not computing, with its share of the step."""
    time = estimate.step_time
    assert time is not None
    name = max(OVERHEADS, key=lambda term: float(getattr(time, term)))
    share = getattr(time, name) / time.total
    return f"{TERMS[name]} {share:.0%}{_causes(estimate)}" if share else "computing"


def growth(estimate: RunEstimate, fewest: RunEstimate) -> str:
    """Name the terms whose GPU time per sample exceeds most that on the fewest GPUs.

    With the same batch, the parts of a rank become too small: products and kernels are less
    efficient, few micro-batches fill the pipeline, and tensor-parallel groups are larger.
    """
    before, after = _gpu_seconds(fewest), _gpu_seconds(estimate)
    total = sum(before.values())
    grown = {name: (after[name] - before[name]) / total for name in TERMS}
    whole = sum(grown.values())
    if whole < MIN_GROWTH:
        return f"as efficient as on {fewest.layout.world_size} GPUs{_causes(estimate)}"
    named = [
        f"{TERMS[name]} +{grown[name]:.0%}"
        for name in sorted(grown, key=lambda term: -grown[term])[:SHOWN]
        if grown[name] >= MIN_GROWTH / 2
    ]
    return f"+{whole:.0%} GPU time: {', '.join(named)}{_causes(estimate)}"


def _gpu_seconds(estimate: RunEstimate) -> dict[str, float]:
    """Return the seconds of all GPUs per sample, by term."""
    gpus, batch = estimate.layout.world_size, estimate.config.training.global_batch_size
    assert estimate.step_time is not None
    return {name: seconds * gpus / batch for name, seconds in vars(estimate.step_time).items()}


def _causes(estimate: RunEstimate) -> str:
    """Say where the layout reaches a limit of the batch or of the node."""
    layout = estimate.layout
    found = []
    if layout.micro_batches < max(2, layout.pp):
        plural = "es" if layout.micro_batches > 1 else ""
        found.append(f"only {layout.micro_batches} micro-batch{plural} per replica and step")
    if layout.tp > estimate.gpu.per_node:
        found.append("TP beyond a node")
    return f" ({'; '.join(found)})" if found else ""
