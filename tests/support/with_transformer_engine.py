"""Training with the stand-in of Transformer Engine on CPUs, or without it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def use_transformer_engine(accepts_boundaries: bool = True) -> None:
    """Let this process use Transformer Engine although it has no GPU.

    Args:
        accepts_boundaries: whether its attention supports the boundaries of documents, as in bf16.
    """
    from megatron_llmjp.model import kernels, transformer_engine
    from megatron_llmjp.patches import foreach_norm, fused_adamw

    stand_in: Any = sys.modules["transformer_engine"]
    stand_in.has_gpu = True
    foreach_norm.is_substituted = fused_adamw.is_substituted = lambda: False
    kernels._transformer_engine_obstacle = lambda device: ""
    if accepts_boundaries:
        transformer_engine._supports_boundaries = lambda dtype, device: True


def work_on_rank(
    jobs: list[dict[str, Any]],
    copies: dict[str, list[str]],
    port: str,
    folder: str,
    te: bool,
    accepts_boundaries: bool,
) -> None:
    """Train all jobs; then load checkpoints and save them again without a step.

    Args:
        jobs: as in :func:`tests.support.training.train_on_rank`.
        copies: command line that loads a checkpoint, by the name of its copy.
        port: a free port.
        folder: of the runs.
        te: whether to use the stand-in of Transformer Engine.
        accepts_boundaries: as in :func:`use_transformer_engine`.
    """
    from tests.support import training

    if te:
        use_transformer_engine(accepts_boundaries)
    training.train_on_rank(jobs, folder)
    if copies:
        copy_checkpoints(copies, port, Path(folder))


def copy_checkpoints(copies: dict[str, list[str]], port: str, folder: Path) -> None:
    from megatron_llmjp.checkpoint.save import RunDescription, SaveProgress
    from megatron_llmjp.checkpoint.saver import FoldEnds, Saver
    from megatron_llmjp.checkpoint.sharded_state import RunState
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.config.loading import replace_fields
    from megatron_llmjp.data.batch_size import BatchSizeSchedule
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks
    from megatron_llmjp.run import resolve_run
    from megatron_llmjp.training import run_setup
    from megatron_llmjp.training.optimizer import LearningRateSchedule

    device, world = setup(), int(os.environ["WORLD_SIZE"])
    ranks = Ranks(int(os.environ["RANK"]), world, 0, "127.0.0.1", port, "test")
    for number, (name, words) in enumerate(copies.items()):
        run = resolve_run(parse(words).config, world)
        if number == 0:
            process_groups.initialize(run.config, ranks, device)
        rates = LearningRateSchedule(
            run.config, run.schedule, BatchSizeSchedule(run.config), run.train_iters
        )
        model = run_setup.setup_model_and_optimizer(run, device, rates)
        about = RunDescription(replace_fields(run.config, save=str(folder / name), load=None))
        state = RunState(model.chunks, model.optimizer, model.scheduler)
        Saver(about, FoldEnds((), frozenset()), lambda: None, 0).save(state, SaveProgress(2, 8))
    process_groups.destroy()
