"""Real process groups and model chunks of each pipeline stage, built on the meta device.

PyTorch's fake process group lets one process act as any rank of any world size; on the meta device
the model has shapes but no storage. The result is compared with the arithmetic of ``layout.py`` and
``memory.py``; a difference is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.layout import ParallelLayout, stage_contents
from megatron_llmjp.estimate.memory import rank_parameters
from megatron_llmjp.model.gpt import build_model_chunk, transformer_config
from megatron_llmjp.parallel.device import Device, setup


@dataclass(frozen=True)
class BuiltRank:
    """First rank of a pipeline stage, as megatron-core sets it up."""

    rank: int
    parameters: int


def build_first_ranks(config: Config, layout: ParallelLayout) -> list[BuiltRank]:
    """Build groups and model chunks of the first rank of each stage, one after the other.

    Of several stages with the same layers, only the first is built.

    Raises:
        UserError: megatron-core rejects the configuration, or parameters or process groups differ
            from the estimate.
    """
    device, built = setup(), []
    for stage in _distinct_stages(config, layout):
        rank = layout.rank(tp=0, cp=0, dp=0, pp=stage)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            built.append(_build_rank(rank, stage, config, layout, device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} cannot be set up: {error}") from error
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return built


def _distinct_stages(config: Config, layout: ParallelLayout) -> list[int]:
    """Return the first stage of each kind, in order."""
    kinds: dict[object, int] = {}
    for stage, chunks in enumerate(layout.stages):
        kinds.setdefault(stage_contents(config, chunks), stage)
    return list(kinds.values())


def _build_rank(
    rank: int, stage: int, config: Config, layout: ParallelLayout, device: Device
) -> BuiltRank:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=config.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_size,
        create_gloo_process_groups=False,
    )
    parameters = sum(_chunk_parameters(config, device, layout, stage))
    estimated = rank_parameters(config, layout, layout.stages[stage])
    if parameters != estimated:
        raise UserError(
            f"stage {stage} has {parameters:,} parameters per rank; the estimate is {estimated:,}"
        )
    groups = {
        "tensor": (parallel_state.get_tensor_model_parallel_group(), layout.rank(1, 0, 0, 0)),
        "data": (parallel_state.get_data_parallel_group(), layout.rank(0, 0, 1, 0)),
        "pipeline": (parallel_state.get_pipeline_model_parallel_group(), layout.rank(0, 0, 0, 1)),
    }
    for name, (group, step) in groups.items():
        ranks = dist.get_process_group_ranks(group)
        if any(b - a != step for a, b in pairwise(ranks)):
            raise UserError(
                f"the {name}-parallel group of rank {rank} is {ranks}; the estimate has steps of "
                f"{step}"
            )
    return BuiltRank(rank, parameters)


def _chunk_parameters(
    config: Config, device: Device, layout: ParallelLayout, stage: int
) -> list[int]:
    # Transformer Engine's layers have the same parameters, and would allocate them.
    config = replace_fields(config, transformer_impl="local")
    core = transformer_config(config, device)
    # Otherwise megatron-core allocates each weight on a real device and initializes it.
    core.use_cpu_initialization, core.perform_initialization = True, False
    counts = []
    for number, chunk in enumerate(layout.stages[stage]):
        with torch.device("meta"):
            model = build_model_chunk(
                config,
                device,
                core,
                pre_process=chunk.embedding,
                post_process=chunk.output,
                vp_stage=number if layout.vp > 1 else None,
            )
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    return counts
