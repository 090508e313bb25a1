"""Which rank holds what: the layout of a run over nodes, stages and layers, without torch.

Ranks are numbered as megatron-core numbers them (``parallel_state.RankGenerator``, order
``tp-cp-ep-dp-pp``): tensor-parallel ranks side by side, then context, then data parallel ones,
pipeline stages farthest apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

from megatron_llmjp.config.schema import Config, ParallelConfig
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one rank runs in one go."""

    first_layer: int
    """From 0."""
    layers: int
    embedding: bool
    output: bool
    """Whether the final norm, the output layer and the loss are here."""


@dataclass(frozen=True)
class Layout:
    """A configuration spread over a number of processes."""

    tp: int
    cp: int
    dp: int
    pp: int
    vp: int
    micro_batches: int
    """Of each replica in one step."""
    stages: tuple[tuple[Chunk, ...], ...]
    """The chunks of each stage."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def bubble(self) -> float:
        """The part of a step's time in which a rank waits for the pipeline to fill and drain.

        (p - 1) / (v m + p - 1) with p stages, v chunks each and m micro-batches (Narayanan et al.,
        2021, section 2.2, as part of the whole).
        """
        return (self.pp - 1) / (self.vp * self.micro_batches + self.pp - 1)

    def rank(self, tp: int, cp: int, dp: int, pp: int) -> int:
        """The number of a process."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def in_flight(self, stage: int) -> int:
        """Chunks of micro-batches whose activations a stage holds at its fullest.

        One-forward-one-backward holds as many as there are stages from here to the end; the
        interleaved schedule (megatron-core's ``get_pp_rank_microbatches``) starts more.
        """
        total = self.micro_batches * self.vp
        if self.vp == 1:
            return min(self.pp - stage, total)
        warm_up = 2 * (self.pp - stage - 1) + (self.vp - 1) * self.pp
        return min(warm_up + 1, total)


def lay_out(config: Config, world_size: int) -> Layout:
    """Spread a configuration over ``world_size`` processes.

    Raises:
        UserError: the sizes do not divide.
    """
    parallel, batch = config.parallel, config.training.global_batch_size
    replicas, rest = divmod(world_size, parallel.model_parallel_size)
    if rest or replicas == 0:
        raise UserError(
            f"{world_size} processes cannot hold copies of TP {parallel.tensor_model_parallel_size}"
            f" x CP {parallel.context_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
            f"= {parallel.model_parallel_size} processes: choose a multiple of that"
        )
    samples = config.training.micro_batch_size * replicas
    if batch % samples:
        raise UserError(
            f"global_batch_size {batch} is not a multiple of micro_batch_size x data parallel size "
            f"= {config.training.micro_batch_size} x {replicas} = {samples}"
        )
    return Layout(
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        dp=replicas,
        pp=parallel.pipeline_model_parallel_size,
        vp=virtual_size(parallel),
        micro_batches=batch // samples,
        stages=split_layers(config),
    )


def virtual_size(parallel: ParallelConfig) -> int:
    """Model chunks per stage."""
    if parallel.pipeline_model_parallel_layout:
        chunks = len(_layout_counts(parallel.pipeline_model_parallel_layout))
        return max(1, chunks // parallel.pipeline_model_parallel_size)
    return parallel.virtual_pipeline_model_parallel_size or 1


def split_layers(config: Config) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of each pipeline stage, as megatron-core splits the layers.

    Raises:
        UserError: the layers do not divide.
    """
    parallel = config.parallel
    pp, vp = parallel.pipeline_model_parallel_size, virtual_size(parallel)
    counts = _counts(config, pp, vp)
    if sum(counts) != config.model.num_layers or min(counts) < 0:
        raise UserError(
            f"{config.model.num_layers} layers cannot be split over {pp} stages"
            + (f" of {vp} chunks" if vp > 1 else "")
            + ": change the number of stages, or give the first and last stage other numbers"
        )
    starts = [0, *accumulate(counts)]
    chunks = [
        Chunk(starts[i], n, embedding=i == 0, output=i == len(counts) - 1)
        for i, n in enumerate(counts)
    ]
    return tuple(tuple(chunks[stage::pp]) for stage in range(pp))


def _counts(config: Config, pp: int, vp: int) -> list[int]:
    """Layers of all chunks, in the order the data passes them."""
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.pipeline_model_parallel_layout:
        return _layout_counts(parallel.pipeline_model_parallel_layout)
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
    behind = int(parallel.account_for_loss_in_pipeline_split)
    counts = [(layers + before + behind) // (pp * vp)] * (pp * vp)
    counts[0] -= before
    counts[-1] -= behind
    return counts


def _layout_counts(text: str) -> list[int]:
    """Layers of each chunk in megatron-core's notation, ``Et*3|t*4|(t*4|)*2t*3L``."""
    text = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), text.replace(" ", ""))
    chunks = text.replace(",", "").split("|")
    return [sum(int(n or 1) for n in re.findall(r"t(?:\*(\d+))?", chunk)) for chunk in chunks]
