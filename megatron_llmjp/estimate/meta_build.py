"""The real groups and model chunks of every distinct rank, without the machines they are for.

PyTorch's fake process group lets one process take the place of any rank of any number; on meta
tensors the model has its sizes and no values. What comes out is compared with the arithmetic of
``layout.py`` and ``memory.py``: a rehearsal that disagrees with it says so and stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.layout import Layout
from megatron_llmjp.estimate.memory import rank_parameters
from megatron_llmjp.model.gpt import build_model_chunk, transformer_config
from megatron_llmjp.parallel.device import Device, setup
from megatron_llmjp.parallel.process_groups import seed_everything


@dataclass(frozen=True)
class Rehearsed:
    """One stage's first rank, as megatron-core sets it up."""

    rank: int
    parameters: int


def rehearse(config: Config, layout: Layout) -> list[Rehearsed]:
    """Be the first rank of each stage in turn.

    Raises:
        UserError: megatron-core refuses, or builds something else than was planned.
    """
    device, found = setup(), []
    for stage in range(layout.pp):
        rank = layout.rank(tp=0, cp=0, dp=0, pp=stage)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            found.append(_be(rank, stage, config, layout, device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} cannot be set up: {error}") from error
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def _be(rank: int, stage: int, config: Config, layout: Layout, device: Device) -> Rehearsed:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,
    )
    seed_everything(config.training.seed)
    parameters = sum(_chunk_parameters(config, device, layout, stage))
    planned = rank_parameters(config, layout, layout.stages[stage])
    if parameters != planned:
        raise UserError(
            f"stage {stage} has {parameters:,} parameters per rank, not the {planned:,} planned"
        )
    groups = {
        "tensor": (parallel_state.get_tensor_model_parallel_group(), layout.rank(1, 0, 0, 0)),
        "data": (parallel_state.get_data_parallel_group(), layout.rank(0, 0, 1, 0)),
        "pipeline": (parallel_state.get_pipeline_model_parallel_group(), layout.rank(0, 0, 0, 1)),
    }
    for name, (group, step) in groups.items():
        ranks = dist.get_process_group_ranks(group)
        if any(b - a != step for a, b in pairwise(ranks)):
            raise UserError(f"the {name}-parallel group of rank {rank} is {ranks}, not as planned")
    return Rehearsed(rank, parameters)


def _chunk_parameters(config: Config, device: Device, layout: Layout, stage: int) -> list[int]:
    core = transformer_config(config, device)
    # Else megatron-core names a device for each weight, and fills it.
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
