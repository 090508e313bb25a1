"""Parallel layouts of models with experts that a search tries: coarse ones first.

Each size of expert parallelism multiplies the layouts of a dense model. So the search first tries
all sizes with few of the other choices, and then all choices with the fastest sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.search.layout_candidates import (
    FULL_RECOMPUTE,
    MICRO_BATCH_SIZES,
    NO_RECOMPUTE,
    VIRTUAL_SIZES,
    layouts_of_sizes,
    split_fields,
    tensor_pipeline_context_sizes,
)


def coarse_candidates(
    config: Config, machine: PlannedMachine, beyond_node: bool = False
) -> Iterator[list[Config]]:
    """Generate the layouts of each combination of sizes, without interleaving.

    All layers or none are recomputed. The first layout of a list needs the least memory.

    Args:
        config: the run's configuration.
        machine: its GPUs.
        beyond_node: whether tensor-parallel groups are larger than a node, instead of within one.
    """
    for t, p, c in tensor_pipeline_context_sizes(config, machine, beyond_node):
        split = split_fields(config, p, None)
        if split is None:
            continue
        ranks = machine.world_size // p
        for ep, etp in expert_sizes(config, t, ranks):
            sized = _with_experts(config, ep, etp)
            pairs = product(MICRO_BATCH_SIZES if c == 1 else (1,), (FULL_RECOMPUTE, NO_RECOMPUTE))
            found = list(layouts_of_sizes(sized, ranks // (t * c), (t, p, c, None), split, pairs))
            if found:
                yield found


def expert_sizes(config: Config, t: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Generate the expert parallel and expert tensor parallel sizes of a stage of ``ranks`` ranks.

    The latter is 1 or the tensor-parallel size ``t``. Without expert parallelism it has to be ``t``
    (``config/expert_validation.py``).
    """
    experts, width = config.model.num_moe_experts or 1, config.model.expert_ffn_size
    for etp in sorted({1, t}):
        for ep in range(1, experts + 1):
            divisible = experts % ep == 0 and ranks % (ep * etp) == 0 and width % etp == 0
            if divisible and (ep > 1 or etp == t):
                yield ep, etp


def refinements(candidate: Config, machine: PlannedMachine) -> Iterator[Config]:
    """Generate all layouts with the sizes of a candidate."""
    parallel = candidate.parallel
    t, p = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    c = parallel.context_parallel_size
    for v in VIRTUAL_SIZES:
        split = split_fields(candidate, p, v)
        if split is not None:
            replicas = machine.world_size // (t * p * c)
            yield from layouts_of_sizes(candidate, replicas, (t, p, c, v), split)


def _with_experts(config: Config, ep: int, etp: int) -> Config:
    return replace_fields(config, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
