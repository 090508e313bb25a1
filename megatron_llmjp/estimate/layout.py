"""Parallel layout of a run: ranks, pipeline stages and the layers of each model chunk.

Ranks are numbered as in megatron-core (``parallel_state.RankGenerator``, order ``tp-cp-ep-dp-pp``):
tensor-parallel ranks are adjacent, followed by context-parallel and data-parallel ranks; pipeline
stages are farthest apart. No torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.config.expert_validation import expert_layout_problems
from megatron_llmjp.config.pipeline_layout import (
    ModelChunk,
    pipeline_bubble,
    split_layers,
    virtual_pipeline_size,
)
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError


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
    ep: int = 1
    """Ranks among which the experts of a layer are divided."""
    etp: int = 1
    """Ranks that share each expert."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def copies(self) -> int:
        """Number of ranks with the same dense parameters."""
        return self.dp * self.cp

    @property
    def expert_copies(self) -> int:
        """Number of ranks with the same experts: megatron-core's expert data-parallel group."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

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
        UserError: ranks, batch, layers or experts are not divisible as the configuration requires.
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
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    if config.model.has_experts:
        _check_experts(config, world_size)
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
        stages=split_layers(parallel, config.model.num_layers),
        ep=ep if config.model.has_experts else 1,
        etp=etp,
    )


def _check_experts(config: Config, world_size: int) -> None:
    """Raise a :class:`UserError` unless the ranks of a stage are divisible among the experts."""
    for problem in expert_layout_problems(config, world_size):
        raise UserError(problem)


def stage_contents(config: Config, chunks: Sequence[ModelChunk]) -> tuple[object, ...]:
    """Return what the chunks of a stage contain; stages with the same contents do the same."""
    kinds = config.model.expert_layers
    return tuple(
        (kinds[chunk.first_layer : chunk.first_layer + chunk.layers], chunk.embedding, chunk.output)
        for chunk in chunks
    )


def recomputed_layers(config: Config, chunks: Sequence[ModelChunk]) -> int:
    """Return how many layers of a stage's chunks are recomputed as a whole.

    ``recompute_num_layers`` with method ``block`` is a number of layers of each chunk.
    """
    return sum(len(recomputed_layer_numbers(config, chunk)) for chunk in chunks)


def recomputed_layer_numbers(config: Config, chunk: ModelChunk) -> range:
    """Return the layers of a chunk, counted in the model from 0, that are recomputed as a whole."""
    parallel, first = config.parallel, chunk.first_layer
    if parallel.recompute_granularity != "full":
        return range(0)
    layers = chunk.layers
    if parallel.recompute_method == "block":
        layers = min(parallel.recompute_num_layers or 1, layers)
    return range(first, first + layers)
