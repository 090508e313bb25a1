"""The run, readable top to bottom: set up, go on from where it was, and step until the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_llmjp.checkpoint import store
from megatron_llmjp.checkpoint.store import Progress, RunState
from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset
from megatron_llmjp.data.epoch_index import Epochs
from megatron_llmjp.data.index_ahead import IndexAhead
from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE
from megatron_llmjp.model.gpt import build_model, choose_kernels
from megatron_llmjp.prepare import Run
from megatron_llmjp.runtime import distributed
from megatron_llmjp.runtime.device import Device
from megatron_llmjp.runtime.ranks import Ranks
from megatron_llmjp.training.evaluate import evaluate
from megatron_llmjp.training.feed import feed
from megatron_llmjp.training.metrics import Metrics, Writer, human
from megatron_llmjp.training.optimizer import (
    apply_configuration,
    complete_parameters,
    make_optimizer,
    make_scheduler,
    wrap_for_data_parallel,
)
from megatron_llmjp.training.step import StepResult, connect, train_step


class TrainingError(RuntimeError):
    """Training cannot go on: the numbers are no numbers any more."""


@dataclass
class Trainer:
    """The live objects of a run."""

    run: Run
    device: Device
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    data: FoldDataset
    validation: dict[str, ValidationDataset]
    indices: IndexAhead
    iteration: int = 0

    @property
    def consumed_samples(self) -> int:
        """Samples trained on so far: the whole state of the data."""
        return self.iteration * self.run.config.training.global_batch_size

    def train(self) -> int:
        """Train to the end of the run, or to where it is to be interrupted.

        Returns:
            The exit code: done, or stopped on request with a checkpoint saved.
        """
        run, config = self.run, self.run.config
        writer = Writer(config, self.iteration) if distributed.is_first_rank() else None
        metrics = Metrics(config, run.schedule, run.train_iters, writer)
        end = run.train_iters * config.training.global_batch_size
        data = feed(self.data, config, self.device, self.consumed_samples, end)
        started = saved = self.iteration
        while self.iteration < run.train_iters:
            learning_rate = self.learning_rate()
            self.indices.before(self.consumed_samples, config.training.global_batch_size)
            result = train_step(self.chunks, self.optimizer, self.scheduler, data, config)
            self.iteration += 1
            self._check_numbers(result)
            metrics.add(result)
            if self._is_due(config.logging.log_interval) or self.iteration == started + 1:
                scale = float(self.optimizer.get_loss_scale())
                metrics.log(self.iteration, self.consumed_samples, learning_rate, result, scale)
            metrics.pause()
            if self._is_due(config.training.eval_interval) and not self._is_last():
                self._validate(metrics)
            if self._is_due(config.checkpoint.save_interval):
                saved = self._save(metrics)
            if self._is_due(config.faults.exit_interval) and not self._is_last():
                if saved != self.iteration:
                    self._save(metrics)
                _say(f"stopped at iteration {self.iteration} as --exit-interval asks")
                return self._close(writer, EXIT_REQUEUE)
            metrics.go_on()
        self._validate(metrics)
        if config.checkpoint.save is not None and saved != self.iteration:
            self._save(metrics)
        return self._close(writer, EXIT_DONE)

    def learning_rate(self) -> float:
        """The rate that the next step applies."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and (self.iteration % interval == 0)

    def _is_last(self) -> bool:
        return self.iteration == self.run.train_iters

    def _validate(self, metrics: Metrics) -> None:
        if self.validation and self.run.config.training.eval_iters:
            losses = evaluate(self.chunks, self.validation, self.run.config, self.device)
            metrics.log_validation(self.iteration, self.consumed_samples, losses)

    def _save(self, metrics: Metrics) -> int:
        complete_parameters(self.chunks, self.run.config)
        progress = Progress(
            self.iteration,
            self.consumed_samples,
            self.run.schedule.touched(self.consumed_samples),
            metrics.last,
        )
        folder = store.save(
            Path(str(self.run.config.checkpoint.save)),
            RunState(self.chunks, self.optimizer, self.scheduler),
            progress,
            self.run.config,
            self.run.tokenizer.files(),
        )
        _say(f"saved checkpoint {folder}")
        return self.iteration

    def _check_numbers(self, result: StepResult) -> None:
        if result.updated and not math.isfinite(result.grad_norm):
            fold = self.run.schedule.fold_at(self.consumed_samples - 1)
            raise TrainingError(
                f"iteration {self.iteration}, fold '{fold.name}': the gradient norm is "
                f"{result.grad_norm}; training stops, the last checkpoint is untouched"
            )

    def _close(self, writer: Writer | None, code: int) -> int:
        if writer:
            writer.close()
        return code


def train(run: Run, ranks: Ranks, device: Device) -> int:
    """Build a run on this rank and train it.

    Returns:
        The exit code.
    """
    data, validation = _datasets(run)
    indices = _indices(run, ranks, data, validation)
    distributed.start(run.config, ranks, device)
    trainer = _build(run, device, data, validation, indices)
    _introduce(trainer, ranks)
    code = trainer.train()
    indices.close()
    distributed.stop()
    return code


def _datasets(run: Run) -> tuple[FoldDataset, dict[str, ValidationDataset]]:
    """Samples of all folds and validation sets."""
    epochs = Epochs(run.config.data, run.tokenizer, run.cache)
    data = FoldDataset(run.schedule, epochs)
    validation = {
        name: ValidationDataset(source.path, run.datasets[source.path], run.schedule.seed, epochs)
        for name, source in run.folds.validation.items()
    }
    return data, validation


def _indices(
    run: Run, ranks: Ranks, data: FoldDataset, validation: dict[str, ValidationDataset]
) -> IndexAhead:
    """Make the indices that are needed first.

    Before process groups exist: an index may take longer than a collective waits.
    """
    say = print if ranks.is_first else lambda text: None
    indices = IndexAhead(data, first_on_machine=ranks.local_rank == 0, say=say)
    going_on = run.resume is not None and not run.config.checkpoint.finetune
    done = run.resume.manifest.consumed_samples if run.resume is not None and going_on else 0
    held_out = [dataset.index for dataset in validation.values()]
    indices.start(done, run.config.training.global_batch_size, held_out)
    return indices


def _build(
    run: Run,
    device: Device,
    data: FoldDataset,
    validation: dict[str, ValidationDataset],
    indices: IndexAhead,
) -> Trainer:
    """Model, optimizer and schedule; from a checkpoint where there is one."""
    config = run.config
    chunks = wrap_for_data_parallel(build_model(config, device), config, device)
    if run.resume is not None and config.checkpoint.finetune:
        store.load(run.resume.folder, RunState(chunks))
    optimizer = make_optimizer(chunks, config, device)
    scheduler = make_scheduler(optimizer, config, run.train_iters)
    connect(chunks, optimizer, config)
    trainer = Trainer(run, device, chunks, optimizer, scheduler, data, validation, indices)
    if run.resume is not None and not config.checkpoint.finetune:
        store.load(run.resume.folder, RunState(chunks, optimizer, scheduler))
        apply_configuration(optimizer, scheduler, config)
        trainer.iteration = run.resume.manifest.iteration
    return trainer


def _introduce(trainer: Trainer, ranks: Ranks) -> None:
    """Tell what runs where."""
    run, parallel = trainer.run, trainer.run.config.parallel
    replicas = ranks.world_size // parallel.model_parallel_size
    parameters = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters())
    tokens = run.schedule.total_samples * run.schedule.sequence_length
    _say(
        f"{ranks.world_size} process(es) by {ranks.started_by} on {trainer.device.name}: "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x DP {replicas}\n"
        f"layers: {choose_kernels(trainer.device)}; "
        f"{human(parameters)} parameters on the first rank\n"
        f"data: {len(run.schedule.folds)} folds, {human(tokens)} tokens, "
        f"{run.train_iters} iterations of {run.config.training.global_batch_size} samples"
    )
    for note in run.notes:
        _say(f"note: {note}")
    if run.resume is not None:
        how = "weights of" if run.config.checkpoint.finetune else "going on from"
        _say(f"{how} {run.resume.folder}")
    dist.barrier()


def _say(text: str) -> None:
    if distributed.is_first_rank():
        print(text, flush=True)
