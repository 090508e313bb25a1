"""Step time of a run by term, from its work, its communication and the bandwidths of its GPUs.

A kernel takes the time of its FLOPs plus that of its bytes; messages take their bytes divided by a
bandwidth. The slowest stage sets the pace of a pipeline, and the slowest replica that of a step.
All sizes follow from the configuration and the layout; seven parameters are fitted to published
runs (``fitted_step_time.py``, docs/estimate.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.communication import CommunicationVolume, communication_volume
from megatron_llmjp.estimate.experts import rank_expert_parameters
from megatron_llmjp.estimate.layout import ParallelLayout, recomputed_layers, stage_contents
from megatron_llmjp.estimate.memory import gathers_keys, rank_parameters
from megatron_llmjp.estimate.speed.fitted_step_time import FITTED
from megatron_llmjp.estimate.speed.step_parameters import (
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    StepParameters,
)
from megatron_llmjp.estimate.speed.step_work import (
    Software,
    StageWork,
    Work,
    stage_work,
)
from megatron_llmjp.estimate.speed.target_gpu import TargetGpu

OPTIMIZER_BYTES = 30
"""Read and written per parameter by Adam: the fp32 gradient (4), main parameter (8) and moments
(16), and the half-precision parameter (2)."""
EXPOSED_SHARE = 0.05
"""Fraction of overlapped data-parallel communication that is always exposed: the last bucket."""
TERMS = {
    "products": "matrix products",
    "attention": "attention scores",
    "element_wise": "element-wise kernels",
    "expert_products": "matrix products of experts",
    "permutation": "routing and permutation of tokens",
    "recompute": "recomputation",
    "output": "embedding, output layer and loss",
    "kernels": "gaps between kernels",
    "tensor": "tensor-parallel communication",
    "context": "context-parallel communication",
    "experts": "expert-parallel communication",
    "pipeline": "pipeline messages",
    "bubble": "pipeline bubble",
    "data": "data-parallel communication",
    "optimizer": "optimizer step",
    "stragglers": "waiting for the slowest replica",
}
"""Description of each term of :class:`StepTime`."""
COMPUTING = (
    "products",
    "attention",
    "element_wise",
    "expert_products",
    "permutation",
    "recompute",
    "output",
    "kernels",
    "tensor",
    "context",
    "experts",
)
"""Terms of forward and backward passes, which ``training/compute_timer.py`` measures together."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest stage by term; communication as far as it is exposed.

    :data:`TERMS` describes the terms. ``bubble``, ``data``, ``optimizer`` and ``stragglers``
    are of a step, not of a micro-batch.
    """

    products: float
    attention: float
    element_wise: float
    recompute: float
    output: float
    kernels: float
    tensor: float
    context: float
    pipeline: float
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    stragglers: float = 0.0
    expert_products: float = 0.0
    permutation: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(vars(self).values())

    @property
    def computing(self) -> float:
        """Seconds of forward and backward passes, with the communication within them."""
        return sum(getattr(self, name) for name in COMPUTING)

    def __mul__(self, factor: float) -> StepTime:
        return StepTime(**{name: seconds * factor for name, seconds in vars(self).items()})

    def sorted_terms(self) -> list[tuple[str, float]]:
        """Return the terms that are not zero, largest first."""
        terms = [(name, seconds) for name, seconds in vars(self).items() if seconds]
        return sorted(terms, key=lambda term: -term[1])


@dataclass(frozen=True)
class StageLoad:
    """Work of one rank of a stage per micro-batch, and its communication per step."""

    work: StageWork
    sent: CommunicationVolume
    parameters: int
    expert_parameters: int
    """Those of them that belong to experts."""
    passes: int
    """Passes through layers per micro-batch: forward, backward and recomputed."""


@dataclass(frozen=True)
class RunLoad:
    """All that the step time depends on, except the GPU."""

    config: Config
    layout: ParallelLayout
    software: Software
    stages: tuple[StageLoad, ...]


def run_load(config: Config, layout: ParallelLayout, software: Software) -> RunLoad:
    """Compute the load of all stages; stages with the same contents share it."""
    known: dict[object, StageLoad] = {}
    stages = []
    for number, chunks in enumerate(layout.stages):
        key = stage_contents(config, chunks)
        if key not in known:
            layers = sum(chunk.layers for chunk in chunks)
            known[key] = StageLoad(
                stage_work(config, layout, software, chunks),
                communication_volume(config, layout, number),
                rank_parameters(config, layout, chunks),
                rank_expert_parameters(config, layout, chunks),
                2 * layers + recomputed_layers(config, chunks),
            )
        stages.append(known[key])
    return RunLoad(config, layout, software, tuple(stages))


def step_time(load: RunLoad, gpu: TargetGpu, parameters: StepParameters = FITTED) -> StepTime:
    """Return the seconds of a step by term.

    With m micro-batches, p stages of v chunks and a time t of a micro-batch on stage s, a step
    takes ``m max(t) + (sum(t) - max(t)) / v``: for equal stages the bubble is ``(p - 1) / (v m)``
    of the ideal time (Narayanan et al., 2021, section 2.2). Of n replicas whose times vary with
    standard deviation sigma, the slowest is ``sigma sqrt(2 ln n)`` slower than the mean (the
    leading term of the maximum of n normal variables).
    """
    model, layout = _Model(load, gpu, parameters), load.layout
    times = {id(stage): model.micro_batch(stage) for stage in load.stages}
    totals = [times[id(stage)].total for stage in load.stages]
    slowest = load.stages[max(range(layout.pp), key=totals.__getitem__)]
    one = times[id(slowest)]
    terms = {name: seconds * layout.micro_batches for name, seconds in vars(one).items()}
    terms["bubble"] = (sum(totals) - one.total) / layout.vp
    terms["data"] = model.data(slowest, one.total)
    terms["optimizer"] = model.optimizer(slowest)
    spread = parameters.stragglers * sqrt(2 * log(layout.dp * layout.cp))
    return StepTime(**{**terms, "stragglers": spread * sum(terms.values())})


@dataclass(frozen=True)
class _Model:
    """Seconds of work and messages on one GPU type."""

    load: RunLoad
    gpu: TargetGpu
    parameters: StepParameters

    def micro_batch(self, stage: StageLoad) -> StepTime:
        """Return the seconds of a micro-batch on a stage."""
        work, sent, m = stage.work, stage.sent, self.load.layout.micro_batches
        attention = self.attention(work.attention)
        recomputed_attention = self.attention(work.recomputed_attention)
        hidden = 0.0 if gathers_keys(self.load.config) else attention + recomputed_attention
        return StepTime(
            products=self.products(work.products),
            attention=attention,
            element_wise=self.memory(work.element_wise.bytes),
            expert_products=self.products(work.expert_products),
            permutation=self.memory(work.permutation.bytes),
            recompute=self.products(work.recomputed_products)
            + recomputed_attention
            + self.memory(work.recomputed_element_wise.bytes)
            + self.products(work.recomputed_expert_products)
            + self.memory(work.recomputed_permutation.bytes),
            output=self.products(work.output_products)
            + self.memory(work.output_element_wise.bytes),
            kernels=stage.passes * self.parameters.kernel,
            tensor=self.tensor(sent.tensor / m),
            context=max(0.0, sent.context / m / self.bandwidth_between_ranks() - hidden),
            experts=self.experts(sent.experts / m),
            pipeline=self.pipeline(sent.pipeline / m),
        )

    def products(self, work: Work) -> float:
        """Return the seconds of matrix products."""
        flops = work.flops / self.efficiency + work.bytes * self.parameters.product_traffic
        return flops / self.gpu.peak

    def attention(self, work: Work) -> float:
        """Return the seconds of the attention scores; without FlashAttention they are in memory."""
        flash = self.load.software.flash_attention
        efficiency = self.efficiency * (self.parameters.attention if flash else 1.0)
        return work.flops / efficiency / self.gpu.peak + self.memory(work.bytes)

    @property
    def efficiency(self) -> float:
        """Fraction of the peak that infinitely large matrix products reach."""
        return float(getattr(self.parameters, f"{self.gpu.products}_products"))

    def memory(self, size: float) -> float:
        """Return the seconds in which kernels read and write ``size`` bytes."""
        return size / (self.gpu.memory_bandwidth * MEMORY_EFFICIENCY)

    @property
    def network(self) -> float:
        """Bytes per second of one GPU between nodes."""
        return self.gpu.network_bandwidth * NETWORK_EFFICIENCY

    @property
    def link(self) -> float:
        """Bytes per second of one GPU within its node."""
        return self.gpu.link_bandwidth * self.parameters.link

    def bandwidth_between_ranks(self) -> float:
        """Return the bandwidth of a group of tensor- and context-parallel ranks."""
        group = self.load.layout.tp * self.load.layout.cp
        return self.link if group <= self.gpu.per_node else self.network

    def tensor(self, size: float) -> float:
        """Return the exposed seconds of tensor-parallel communication."""
        if self.load.software.overlaps_tensor_communication:
            return 0.0
        return size / (self.link if self.load.layout.tp <= self.gpu.per_node else self.network)

    def experts(self, size: float) -> float:
        """Return the seconds of the exchange of tokens between the ranks of the experts.

        The ranks are adjacent: the part for ranks of the same node uses its links.
        """
        layout = self.load.layout
        ranks = layout.ep * layout.etp
        if ranks <= self.gpu.per_node:
            return size / self.link
        within = (self.gpu.per_node - 1) / (ranks - 1)
        return size * (within / self.link + (1 - within) / self.network)

    def pipeline(self, size: float) -> float:
        """Return the exposed seconds of messages between stages."""
        layout, software = self.load.layout, self.load.software
        if layout.vp > 1 and software.overlaps_pipeline_communication:
            return 0.0
        whole = not self.load.config.parallel.sequence_parallel
        parts = layout.tp if software.scatters_pipeline_messages and whole else 1
        bandwidth = self.link if layout.world_size <= self.gpu.per_node else self.network
        return size / parts / bandwidth

    def data(self, stage: StageLoad, micro_batch: float) -> float:
        """Return the exposed seconds of data-parallel communication.

        Rings between nodes use the network of all ranks that the group has on a node. Gradients
        overlap with the backward pass of the last micro-batch, two thirds of its time, and
        parameters with the forward pass of the first; with interleaving those of most chunks
        also overlap with other micro-batches.
        """
        layout, parallel, sent = self.load.layout, self.load.config.parallel, stage.sent
        dense = self.bandwidth_between_copies(layout.tp, layout.copies)
        experts = self.bandwidth_between_copies(layout.ep * layout.etp, layout.expert_copies)
        share = self.load.software.gradient_bytes / 4
        gradients = sent.gradients * share / dense + sent.expert_gradients * share / experts
        parameters = sent.parameters / dense + sent.expert_parameters / experts
        window = micro_batch * max(1.0, layout.pp * (layout.vp - 1) / layout.vp)
        if parallel.overlap_grad_reduce:
            gradients = max(EXPOSED_SHARE * gradients, gradients - window * 2 / 3)
        if parallel.overlap_param_gather:
            parameters = max(EXPOSED_SHARE * parameters, parameters - window / 3)
        return gradients + parameters + sent.embedding / self.network

    def bandwidth_between_copies(self, distance: int, copies: int) -> float:
        """Return the bandwidth of a data-parallel group whose ranks are ``distance`` apart."""
        if copies * distance <= self.gpu.per_node:
            return self.link
        local = max(1, self.gpu.per_node // distance)
        return min(self.link, self.network * min(local, copies))

    def optimizer(self, stage: StageLoad) -> float:
        """Return the seconds of the gradient norm, Adam, and zeroing gradients."""
        layout, parallel = self.load.layout, self.load.config.parallel
        experts, dense = stage.expert_parameters, stage.parameters - stage.expert_parameters
        size = 0.0
        for parameters, copies in ((dense, layout.copies), (experts, layout.expert_copies)):
            shards = copies if parallel.use_distributed_optimizer else 1
            per_parameter = OPTIMIZER_BYTES / shards + 2 * self.load.software.gradient_bytes
            size += parameters * per_parameter
        return self.memory(size)
