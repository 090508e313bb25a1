"""Losses of routers and tokens per expert, accumulated over a log interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_llmjp.config.schema import Config, ModelConfig
from megatron_llmjp.interval_stats import ExpertStats

_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "z_loss")
"""Losses that megatron-core's routers add to its tracker, without their coefficients."""

_CALLS, _CHOICES, _FIRST_EXPERT = len(_LOSSES), len(_LOSSES) + 1, len(_LOSSES) + 2
"""Columns of the sums, after those of the losses."""


class ExpertMonitor:
    """Counts the tokens of each expert in training, without a wait for the device.

    Args:
        chunks: model chunks of this rank; hooks are added to their routers.
        config: the run's configuration, of a model with experts.
    """

    def __init__(self, chunks: Sequence[nn.Module], config: Config) -> None:
        self._model: ModelConfig = config.model
        columns = _FIRST_EXPERT + (config.model.num_moe_experts or 0)
        self._sums = torch.zeros(
            config.model.num_layers,
            columns,
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        # Of an earlier run in this process, whose number of layers may differ.
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        """Count the tokens of a micro-batch; recomputation calls a router without gradients."""
        if not router.training or not torch.is_grad_enabled():
            return
        probs, routing_map = output
        # Padding to the capacity routes tokens to experts that they did not choose.
        padded = self._model.moe_pad_expert_input_to_capacity
        tokens = ((probs > 0) & routing_map if padded else routing_map).sum(dim=0)
        row = self._sums[router.layer_number - 1]
        row[_CALLS] += 1
        row[_CHOICES] += len(routing_map) * self._model.moe_router_topk
        row[_FIRST_EXPERT:] += tokens

    def take(self) -> ExpertStats:
        """Return the statistics since the last call over all ranks; a collective.

        Each rank holds its own layers. The load balancing losses of the ranks that share a sequence
        are parts of a sum, the z-losses are means over the tokens of a rank.
        """
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        for column, name in enumerate(_LOSSES):
            if name in tracker:
                self._sums[:, column] = tracker[name]["values"]
        moe_utils.clear_aux_losses_tracker()
        sums = self._sums.clone()
        self._sums.zero_()
        dist.all_reduce(sums)
        return self._statistics(np.array(sums.tolist()))

    def _statistics(self, sums: npt.NDArray[np.float64]) -> ExpertStats:
        model = self._model
        rows = sums[np.array(model.expert_layers)]
        calls = np.maximum(rows[:, _CALLS], 1)
        parts = parallel_state.get_tensor_model_parallel_world_size()
        parts *= parallel_state.get_context_parallel_world_size()
        balancing = (rows[:, 0] + rows[:, 1]) * parts / calls
        tokens = rows[:, _FIRST_EXPERT:]
        load = tokens.max(axis=1) / np.maximum(tokens.mean(axis=1), 1)
        numbers = [i for i, has_experts in enumerate(model.expert_layers, 1) if has_experts]
        dropped = 1 - float(tokens.sum() / max(rows[:, _CHOICES].sum(), 1))
        return ExpertStats(
            load_balancing_loss=float(balancing.mean()) if model.moe_aux_loss_coeff else None,
            router_z_loss=float((rows[:, 2] / calls).mean()) if model.moe_z_loss_coeff else None,
            load=dict(zip(numbers, map(float, load), strict=True)),
            tokens={i: [int(n) for n in row] for i, row in zip(numbers, tokens, strict=True)},
            dropped=dropped if model.moe_expert_capacity_factor is not None else None,
        )
