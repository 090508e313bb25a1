"""Pipeline layout: megatron-core's layout notation, virtual pipeline size and pipeline bubble."""

from __future__ import annotations

import re

from megatron_llmjp.config.schema import ParallelConfig


def expand_pipeline_layout(text: str) -> str:
    """Expand all repetitions of a layout such as ``Et*3|(t|)*2t*3L`` to one letter per module.

    The notation is that of megatron-core's ``PipelineParallelLayerLayout``: E is the embedding, t
    a layer, L the loss, ``|`` separates stages, ``x*3`` and ``(xy)*3`` repeat, commas are ignored.
    """
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text


def virtual_pipeline_size(parallel: ParallelConfig) -> int:
    """Return the number of model chunks per pipeline stage."""
    if parallel.pipeline_model_parallel_layout:
        chunks = expand_pipeline_layout(parallel.pipeline_model_parallel_layout).count("|") + 1
        return max(1, chunks // parallel.pipeline_model_parallel_size)
    return parallel.virtual_pipeline_model_parallel_size or 1


def pipeline_bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Return the fraction of a step in which a rank waits for the pipeline to fill and drain.

    (p - 1) / (v m + p - 1) with p stages, v chunks per stage and m micro-batches (Narayanan et al.,
    2021, section 2.2, there as a fraction of the ideal time).
    """
    return (stages - 1) / (micro_batches * chunks + stages - 1)
