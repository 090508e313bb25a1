"""The optimizer of a Megatron-DeepSpeed run, as canonical tensors: what ZeRO keeps of it.

:mod:`zero` reads one model-parallel rank; here ranks are joined, as the weights are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert import zero
from megatron_llmjp.convert.megatron_deepspeed_names import join_separate_keys, parameter_name
from megatron_llmjp.convert.megatron_ranks import Gathered
from megatron_llmjp.convert.optimizer_state import (
    MAIN,
    MOMENTS,
    OptimizerState,
    make_state,
)
from megatron_llmjp.convert.plan import Read
from megatron_llmjp.convert.torch_archive import load

_LAYER_FILE = re.compile(r"layer_(\d+)-model_\d+-model_states\.pt$")


@dataclass(frozen=True)
class ZeroFolder:
    """All optimizer files of a ``global_step*`` folder."""

    folder: Path
    model: ModelConfig
    ranks: dict[int, zero.ZeroRank]
    """By model-parallel rank, stage by stage."""
    tensor_parallel: int

    def tensors(self, kind: str) -> dict[str, Read]:
        """How to read one kind, ``param`` or a moment, of every parameter; its type is fp32.

        Of tied embeddings the first stage's are taken: the last one's copy of the position
        embeddings is never kept in step with them.

        Raises:
            UserError: a rank lacks them.
        """
        found = (_LAYER_FILE.match(path.name) for path in self.folder.iterdir())
        numbers = sorted({int(match[1]) for match in found if match})
        gathered = Gathered()
        for rank, state in self.ranks.items():
            for name, stored in state.tensors(kind):
                if name.startswith("tied_modules.embed.") and rank >= self.tensor_parallel:
                    continue
                canonical = parameter_name(name, stored, numbers)
                gathered.add(canonical, rank % self.tensor_parallel, stored)
        where, size = self.folder, self.tensor_parallel
        joined = join_separate_keys(where, gathered, self.model, size)
        return joined | gathered.reads(where, self.model, size)

    def state(self, content: dict[str, Any]) -> OptimizerState:
        """What a run goes on with.

        Args:
            content: of the first rank's ``mp_rank_*`` file, which has the schedule's state.

        Raises:
            UserError: there are no moments, or no schedule.
        """
        first = self.ranks[0]
        tensors = {kind: self.tensors(kind) for kind in (*MOMENTS, MAIN)}
        told = {
            "opt_param_scheduler": content.get("lr_scheduler"),
            "optimizer": {"grad_scaler": first.grad_scaler},
        }
        return make_state(tensors, first.step, first.groups, told, self.folder)


def open_folder(
    folder: Path, model: ModelConfig, ranks: dict[int, Path], tensor_parallel: int
) -> ZeroFolder:
    """Open the optimizer files beside every ``mp_rank_*`` file.

    Raises:
        UserError: one is missing or damaged, or the run was trained without ZeRO.
    """
    opened = {
        rank: zero.open_rank(folder, rank, load(path).get("param_shapes"))
        for rank, path in sorted(ranks.items())
    }
    return ZeroFolder(folder, model, opened, tensor_parallel)
