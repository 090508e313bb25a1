"""All numbers of an estimate as plain data, for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.checkpoints import checkpoint_bytes
from megatron_llmjp.estimate.expert_report import expert_numbers
from megatron_llmjp.estimate.flops import flops_by_part, step_flops
from megatron_llmjp.estimate.run_estimate import RunEstimate
from megatron_llmjp.estimate.search.layout_search import LayoutCandidate
from megatron_llmjp.estimate.search.layout_table import layout_flags


def estimate_numbers(estimate: RunEstimate) -> dict[str, Any]:
    """Return the numbers of an estimate, in bytes, seconds and FLOPs."""
    config, layout = estimate.config, estimate.layout
    batch = config.training.global_batch_size
    low, high = estimate.error_range
    counts = count_parameters(config)
    seconds = estimate.seconds
    return {
        "gpu": asdict(estimate.gpu),
        "gpus": layout.world_size,
        "layout": asdict(layout),
        "parameters": {
            "total": counts.total,
            "non_embedding": counts.non_embedding,
            "active": counts.active,
        },
        "flops_per_sample": asdict(flops_by_part(config)),
        "flops_per_step": step_flops(config, batch),
        "tokens_per_step": batch * config.data.seq_length,
        "stages": [
            {"parameters": parameters, "memory": asdict(memory), "sent_per_step": asdict(sent)}
            for parameters, memory, sent in zip(
                estimate.parameters, estimate.memory, estimate.communication, strict=True
            )
        ],
        "experts": expert_numbers(estimate),
        "fits": estimate.fits,
        "memory_fraction": estimate.memory_fraction,
        "step_seconds": estimate.step_seconds,
        "step_seconds_range": [low * estimate.step_seconds, high * estimate.step_seconds],
        "step_terms": vars(estimate.step_time) if estimate.step_time else None,
        "accuracy": asdict(estimate.accuracy) if estimate.accuracy else None,
        "measured_runs": [
            {
                "folder": run.measured.folder,
                "gpus": run.measured.world_size,
                "iterations": run.measured.iterations,
                "step_seconds": run.measured.seconds,
                "computing_seconds": run.measured.computing,
                "predicted_terms": vars(run.predicted),
            }
            for run in estimate.measured_runs
        ],
        "mfu": estimate.mfu,
        "bubble": layout.bubble,
        "length": asdict(estimate.length) if estimate.length else None,
        "run_seconds": seconds,
        "run_seconds_range": [low * seconds, high * seconds] if seconds is not None else None,
        "checkpoint_bytes": checkpoint_bytes(config),
        "failures": asdict(estimate.failures),
    }


def candidate_numbers(candidate: LayoutCandidate, given: Config) -> dict[str, Any]:
    """Return the numbers of a suggested layout, with the flags that change the given one to it."""
    flags = layout_flags(candidate.estimate.config, given)
    return {"flags": flags, "given": candidate.given, **estimate_numbers(candidate.estimate)}
