"""Training steps of this project with its own model, optimizer, data loader and step function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.gpu import runs
from benchmarks.gpu.results import Context
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.parallel import process_groups
from megatron_llmjp.parallel.device_agreement import check_devices
from megatron_llmjp.parallel.ranks import single_process
from megatron_llmjp.parallel.rendezvous import rendezvous
from megatron_llmjp.training import run_setup
from megatron_llmjp.training.batch_iterator import batch_iterators
from megatron_llmjp.training.garbage_collection import GarbageCollector
from megatron_llmjp.training.optimizer import LearningRateSchedule
from megatron_llmjp.training.train_step import train_step

PLANNED_STEPS = 60
"""Steps that the data suffices for; the data loader is started again for each batch size."""


class Session:
    """Steps of a preset in one process, as the trainer runs them, without logs and saves."""

    def __init__(self, context: Context, preset: str, layers: str = "torch") -> None:
        scale = context.scale
        words = [*scale.shrink, "--bf16", "--no-fp16", *runs.layer_flags(layers)]
        words += ["--micro-batch-size", str(scale.micro_batch_sizes[0])]
        words += ["--global-batch-size", str(scale.samples_per_step)]
        words += ["--train-iters", str(PLANNED_STEPS)]
        tokens = PLANNED_STEPS * scale.samples_per_step * scale.longest_sample
        run, self.device = runs.resolve(runs.run_flags(context, preset, *words, tokens=2 * tokens))
        self.config: Config = run.config
        self._run, self._sizes, ranks = run, BatchSizeSchedule(run.config), single_process()
        store = rendezvous(ranks)
        check_devices(store, ranks, self.device)
        self._data = run_setup.open_datasets(run, ranks)
        process_groups.initialize(run.config, ranks, self.device, store)
        rates = LearningRateSchedule(run.config, run.schedule, self._sizes, run.train_iters)
        self.model = run_setup.setup_model_and_optimizer(run, self.device, rates)
        self._batches: list[Iterator[Any]] = []
        self._steps, self._garbage = 0, GarbageCollector(run.config.training)
        self._open = ExitStack()
        self._open.callback(process_groups.destroy)
        self._open.callback(self._data.indices.close)
        self._open.enter_context(self._garbage.disabled())
        self.use_micro_batch_size(scale.micro_batch_sizes[0])

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for chunk in self.model.chunks for p in chunk.parameters())

    @property
    def layer_classes(self) -> str:
        """Classes of the modules that compute a layer."""
        modules = self.model.chunks[0].module.modules()
        leaves = (module for module in modules if not any(module.children()))
        return ", ".join(dict.fromkeys(type(module).__name__ for module in leaves))

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of one step."""
        return self.config.training.global_batch_size * self.config.data.seq_length

    def use_micro_batch_size(self, size: int) -> None:
        """Run the next steps with micro-batches of another size; starts a data loader."""
        self.config = replace_fields(self.config, micro_batch_size=size)
        end = self._sizes.consumed_after(self._run.train_iters)
        self._batches = batch_iterators(
            self._data.training, self.config, self.device, 0, end, self._sizes.at
        )

    def step(self) -> None:
        """Run one optimizer step, which waits for the device once, at the gradient norm.

        Raises:
            RuntimeError: the gradient norm is not finite.
        """
        model = self.model
        result = train_step(
            model.chunks,
            model.optimizer,
            model.scheduler,
            self._batches,
            self.config,
            self.config.training.global_batch_size,
            datasets=1,
            should_apply=math.isfinite,
        )
        if not result.updated:
            raise RuntimeError(f"the gradient norm is {result.grad_norm}")
        self._steps += 1
        self._garbage.after_iteration(self._steps)

    def close(self) -> None:
        """Stop the data loader and destroy the process groups."""
        self._batches = []
        self._open.close()


def synchronize(context: Context) -> None:
    """Wait for the device."""
    if context.is_cuda:
        torch.cuda.synchronize()
