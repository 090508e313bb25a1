"""Pipeline layout: the layers of each model chunk, megatron-core's layout notation, the bubble."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

from megatron_llmjp.config.schema import ParallelConfig
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class ModelChunk:
    """Consecutive layers of one pipeline stage; with interleaving a stage has several chunks."""

    first_layer: int
    """From 0."""
    layers: int
    embedding: bool
    output: bool
    """Whether the chunk contains the final norm, the output layer and the loss."""


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


def split_layers(parallel: ParallelConfig, num_layers: int) -> tuple[tuple[ModelChunk, ...], ...]:
    """Return the chunks of each pipeline stage, split as megatron-core splits the layers.

    Raises:
        UserError: the layers are not divisible over the stages.
    """
    pp, vp = parallel.pipeline_model_parallel_size, virtual_pipeline_size(parallel)
    counts = _layers_per_chunk(parallel, num_layers, pp, vp)
    if sum(counts) != num_layers or min(counts) < 0:
        raise UserError(
            f"{num_layers} layers cannot be split over {pp} stages"
            + (f" of {vp} chunks" if vp > 1 else "")
            + ": change pipeline_model_parallel_size, or set decoder_first_pipeline_num_layers or "
            "decoder_last_pipeline_num_layers"
        )
    starts = [0, *accumulate(counts)]
    chunks = [
        ModelChunk(starts[i], n, embedding=i == 0, output=i == len(counts) - 1)
        for i, n in enumerate(counts)
    ]
    return tuple(tuple(chunks[stage::pp]) for stage in range(pp))


def _layers_per_chunk(parallel: ParallelConfig, layers: int, pp: int, vp: int) -> list[int]:
    """Return the number of layers of each chunk, in forward order."""
    if parallel.pipeline_model_parallel_layout:
        text = expand_pipeline_layout(parallel.pipeline_model_parallel_layout)
        return [chunk.count("t") for chunk in text.split("|")]
    first, last = (
        parallel.decoder_first_pipeline_num_layers,
        parallel.decoder_last_pipeline_num_layers,
    )
    if first is not None or last is not None:
        middle = pp - (first is not None) - (last is not None)
        rest = layers - (first or 0) - (last or 0)
        each = rest // middle if middle else 0
        stages = [each] * pp
        stages[0], stages[-1] = first or stages[0], last or stages[-1]
        return [stages[i % pp] // vp for i in range(pp * vp)]
    before = int(parallel.account_for_embedding_in_pipeline_split)
    after = int(parallel.account_for_loss_in_pipeline_split)
    counts = [(layers + before + after) // (pp * vp)] * (pp * vp)
    counts[0] -= before
    counts[-1] -= after
    return counts
