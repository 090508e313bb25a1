"""Parallel layout of a run: ranks, pipeline stages and the layers of each model chunk.

Ranks are numbered as in megatron-core (``parallel_state.RankGenerator``, order ``tp-cp-ep-dp-pp``):
tensor-parallel ranks are adjacent, followed by context-parallel and data-parallel ranks; pipeline
stages are farthest apart. No torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_llmjp.config.pipeline_layout import (
    expand_pipeline_layout,
    pipeline_bubble,
    virtual_pipeline_size,
)
from megatron_llmjp.config.schema import Config
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


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all kinds of parallelism, and the model chunks of each pipeline stage."""

    tp: int
    cp: int
    dp: int
    pp: int
    vp: int
    micro_batches: int
    """Per replica and step."""
    stages: tuple[tuple[ModelChunk, ...], ...]
    """The chunks of each stage."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def bubble(self) -> float:
        """Fraction of a step in which a rank waits for the pipeline to fill and drain."""
        return pipeline_bubble(self.pp, self.micro_batches, self.vp)

    def rank(self, tp: int, cp: int, dp: int, pp: int) -> int:
        """Return the global rank at these coordinates."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def in_flight(self, stage: int) -> int:
        """Return the peak number of micro-batches, times chunks, whose activations a stage holds.

        One-forward-one-backward holds one per stage from this one to the last; the interleaved
        schedule (megatron-core's ``get_pp_rank_microbatches``) has a longer warm-up.
        """
        total = self.micro_batches * self.vp
        if self.vp == 1:
            return min(self.pp - stage, total)
        warm_up = 2 * (self.pp - stage - 1) + (self.vp - 1) * self.pp
        return min(warm_up + 1, total)


def make_layout(config: Config, world_size: int) -> ParallelLayout:
    """Distribute a configuration over ``world_size`` ranks.

    Raises:
        UserError: ranks, batch or layers are not divisible as the configuration requires.
    """
    parallel, batch = config.parallel, config.training.global_batch_size
    replicas, rest = divmod(world_size, parallel.model_parallel_size)
    if rest or replicas == 0:
        raise UserError(
            f"{world_size} processes are not divisible into replicas of TP "
            f"{parallel.tensor_model_parallel_size} x CP {parallel.context_parallel_size} x PP "
            f"{parallel.pipeline_model_parallel_size} = {parallel.model_parallel_size} processes: "
            "choose a multiple of that"
        )
    samples = config.training.micro_batch_size * replicas
    if batch % samples:
        raise UserError(
            f"global_batch_size {batch} is not a multiple of micro_batch_size x data parallel size "
            f"= {config.training.micro_batch_size} x {replicas} = {samples}"
        )
    return ParallelLayout(
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        dp=replicas,
        pp=parallel.pipeline_model_parallel_size,
        vp=virtual_pipeline_size(parallel),
        micro_batches=batch // samples,
        stages=split_layers(config),
    )


def split_layers(config: Config) -> tuple[tuple[ModelChunk, ...], ...]:
    """Return the chunks of each pipeline stage, split as megatron-core splits the layers.

    Raises:
        UserError: the layers are not divisible over the stages.
    """
    parallel = config.parallel
    pp, vp = parallel.pipeline_model_parallel_size, virtual_pipeline_size(parallel)
    counts = _layers_per_chunk(config, pp, vp)
    if sum(counts) != config.model.num_layers or min(counts) < 0:
        raise UserError(
            f"{config.model.num_layers} layers cannot be split over {pp} stages"
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


def _layers_per_chunk(config: Config, pp: int, vp: int) -> list[int]:
    """Return the number of layers of each chunk, in forward order."""
    parallel, layers = config.parallel, config.model.num_layers
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


def stage_contents(chunks: Sequence[ModelChunk]) -> tuple[tuple[int, bool, bool], ...]:
    """Return what the chunks of a stage contain; stages with the same contents do the same."""
    return tuple((chunk.layers, chunk.embedding, chunk.output) for chunk in chunks)


def recomputed_layers(config: Config, chunks: Sequence[ModelChunk]) -> int:
    """Return how many layers of a stage's chunks are recomputed as a whole.

    ``recompute_num_layers`` with method ``block`` is a number of layers of each chunk.
    """
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return 0
    each = parallel.recompute_num_layers or 1
    whole = parallel.recompute_method != "block"
    return sum(chunk.layers if whole else min(each, chunk.layers) for chunk in chunks)
