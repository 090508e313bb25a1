"""Experts in the report of an estimate: their part of the memory, and the traffic of a layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.estimate.expert_memory import ExpertMemory, expert_memory
from megatron_llmjp.estimate.experts import expert_load, expert_traffic
from megatron_llmjp.estimate.run_estimate import RunEstimate
from megatron_llmjp.formatting import format_gigabytes, format_table

UNMEASURED = (
    "no published run with experts is among the runs that the model of step times is fitted to: "
    "its error is unknown; the load of experts is assumed to be balanced"
)


def format_experts(estimate: RunEstimate) -> str:
    """Format the experts of a rank of the stage with the highest memory use, next to the rest."""
    config, layout, stage = estimate.config, estimate.layout, estimate.worst_stage
    memory, whole = expert_memory(config, layout, stage), estimate.memory[stage]
    load, traffic = expert_load(config, layout), expert_traffic(config, layout)
    dense = estimate.parameters[stage] - memory.parameters
    rows = [(f"per GPU of stage {stage}", "dense", "experts")]
    rows.append(("  parameters", f"{dense:,}", f"{memory.parameters:,}"))
    for kind in ("weights", "gradients", "optimizer"):
        experts = getattr(memory, kind)
        others = getattr(whole, kind) - experts
        rows.append((f"  {kind}", format_gigabytes(others), format_gigabytes(experts)))
    rows.append(("  ranks with the same", f"{layout.copies:,}", f"{layout.expert_copies:,}"))
    counts = count_parameters(config)
    dispatcher = config.parallel.moe_token_dispatcher_type
    kept = format_gigabytes(memory.activations)
    return "\n".join(
        [
            f"{counts.active:,} parameters are active per token; EP {layout.ep} x expert TP "
            f"{layout.etp}: {load.local_experts} of {config.model.num_moe_experts} experts per GPU",
            format_table(rows, right=(1, 2)),
            f"per layer with experts and micro-batch: {load.tokens:,} tokens routed, {load.rows:,} "
            f"rows multiplied, {kept} kept by router and experts",
            f"sent per layer and micro-batch ({dispatcher}): {format_gigabytes(traffic.forward)} "
            f"forward, {format_gigabytes(traffic.backward)} backward",
        ]
    )


def expert_numbers(estimate: RunEstimate) -> dict[str, Any] | None:
    """Return the numbers of experts, in bytes; None for a dense model."""
    config, layout = estimate.config, estimate.layout
    if not config.model.has_experts:
        return None
    return {
        "load": asdict(expert_load(config, layout)),
        "sent_per_layer": asdict(expert_traffic(config, layout)),
        "dense_copies": layout.copies,
        "expert_copies": layout.expert_copies,
        "stages": [asdict(memory) for memory in _stages(estimate)],
    }


def _stages(estimate: RunEstimate) -> list[ExpertMemory]:
    stages = range(estimate.layout.pp)
    return [expert_memory(estimate.config, estimate.layout, stage) for stage in stages]
