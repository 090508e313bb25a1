"""The training loop: steps, validation, saves, stop requests and rollbacks of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.removal import REMOVAL_WAIT_SECONDS
from megatron_llmjp.checkpoint.retention import SaveKind, TrainingPosition
from megatron_llmjp.checkpoint.save import SaveProgress
from megatron_llmjp.checkpoint.saver import Saver
from megatron_llmjp.checkpoint.sharded_state import RunState
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataloader import Batch
from megatron_llmjp.data.folds.fingerprint import dump_fold_file
from megatron_llmjp.errors import EXIT_DONE, RunError, UserError
from megatron_llmjp.parallel import process_groups
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.run import Run
from megatron_llmjp.training.batch_iterator import batch_iterators, dataset_names
from megatron_llmjp.training.evaluation import evaluate
from megatron_llmjp.training.expert_monitor import ExpertMonitor
from megatron_llmjp.training.garbage_collection import GarbageCollector
from megatron_llmjp.training.gradient_monitor import (
    GradientMonitor,
    Rollback,
    StepStatus,
    count_recent_rollbacks,
    count_rollbacks,
    describe_bad_step,
    describe_failure,
    planned_iterations,
)
from megatron_llmjp.training.instruments import StepInstruments
from megatron_llmjp.training.log_writers import MetricsWriters
from megatron_llmjp.training.metrics import TrainingMetrics
from megatron_llmjp.training.optimizer import gather_parameters, parameter_norm
from megatron_llmjp.training.run_setup import (
    ModelAndOptimizer,
    RunDatasets,
    initial_progress,
    print_rank_0,
)
from megatron_llmjp.training.stop_signals import StopReason
from megatron_llmjp.training.train_step import StepResult, is_finite_on_all_ranks, train_step
from megatron_llmjp.training.watchdog import RunControl

METRICS_STATE = "metrics"
"""Key of the metrics' counters in a checkpoint."""

GRADIENT_NORMS_STATE = "gradient norms"
"""Key of the gradient monitor's history in a checkpoint."""

GRADIENT_MONITOR_STATE = "bad steps"
"""Key of the gradient monitor's counters in a checkpoint."""

REMOVAL_SECONDS = 10.0
"""A run that is asked to stop waits at most this long for the removal of old checkpoints."""


class TrainingError(RunError):
    """A run cannot continue, or ended incomplete, because of bad steps or rollbacks."""


@dataclass
class Trainer:
    """State of a training run on this rank."""

    run: Run
    device: Device
    sizes: BatchSizeSchedule
    model: ModelAndOptimizer
    data: RunDatasets
    saver: Saver
    control: RunControl
    monitor: GradientMonitor
    garbage: GarbageCollector
    iteration: int
    consumed_samples: int
    """Samples trained on so far: the complete state of the data."""
    instruments: StepInstruments
    hardware: str = ""
    due_save: SaveKind = SaveKind.NONE
    """A save that is postponed: until the next good step, or the end of an asynchronous one."""

    def train(self) -> int | Rollback:
        """Train until the run is done, stopped, or has to be rolled back.

        Returns:
            The exit code of a run that is done or was stopped with a checkpoint saved; or the
            rollback to carry out.
        """
        writers = MetricsWriters(self.run.config) if process_groups.is_first_rank() else None
        metrics = self._metrics(writers)
        metrics.start(self.iteration, self.consumed_samples, self.hardware)
        if METRICS_STATE in self.model.counters:
            metrics.load_state_dict(self.model.counters[METRICS_STATE])
        self.monitor.load_state_dict(self.model.counters.get(GRADIENT_MONITOR_STATE, {}))
        try:
            with self.garbage.disabled(), self.instruments:
                outcome = self._train(metrics)
        except RunError as error:
            metrics.end(self.iteration, self.consumed_samples, "failed", str(error))
            _close(writers)
            raise
        _close(writers)
        return outcome

    def _train(self, metrics: TrainingMetrics) -> int | Rollback:
        config, started = self.run.config, self.iteration
        batches, datasets = self._batches(), len(dataset_names(self.run.schedule))
        while not self._is_done():
            learning_rate, before = self.learning_rate(), self._moment()
            batch_size = self.sizes.at(self.consumed_samples)
            if not self._has_indices(batch_size):
                return self._stop(self.control.stop.agreed(), metrics)
            # The first step of a process compiles and connects without giving heartbeats.
            self._begin("a step", counts_work=self.iteration == started)
            result = self._step(batches, batch_size, datasets)
            if self.monitor.status in (StepStatus.BAD, StepStatus.SPIKE):
                limit_reached = self._limit_reached()
                self._report_bad_step(result, batch_size, metrics, limit_reached)
                if limit_reached:
                    self._fail(result)
                if self.monitor.needs_rollback:
                    return self._rollback(batch_size)
            metrics.add(
                self.iteration, self.consumed_samples, result, batch_size, self.monitor.status
            )
            if self._is_due(config.logging.log_interval) or self.iteration == started + 1:
                self._log(metrics, result, learning_rate, batch_size)
            self.garbage.after_iteration(self.iteration)
            metrics.pause()
            if self._is_due(config.training.eval_interval) and not self._is_done():
                self._validate(metrics)
            self._save_if_due(before, metrics)
            reason = self._stop_reason()
            if reason and not self._is_done():
                return self._stop(reason, metrics)
            metrics.resume()
        self._validate(metrics)
        self._finish(metrics)
        return EXIT_DONE

    def _step(self, batches: list[Iterator[Batch]], batch_size: int, datasets: int) -> StepResult:
        """Train on the next global batch and classify the step."""
        self.monitor.begin_step()
        model, config = self.model, self.run.config
        with self.instruments.step(self.iteration):
            result = train_step(
                model.chunks,
                model.optimizer,
                model.scheduler,
                batches,
                config,
                batch_size,
                datasets,
                self.monitor.should_apply,
                self.saver.hold_update,
                self.control.sync.beat,
            )
        if not result.updated and self.monitor.status is StepStatus.GOOD:
            scale = float(model.optimizer.get_loss_scale())
            is_finite = is_finite_on_all_ranks(result.sums)
            self.monitor.record_overflow(config.optimizer, scale, is_finite)
        self.iteration += 1
        self.consumed_samples += batch_size
        self.saver.may_remove = self.monitor.may_save
        return result

    def _save_if_due(self, before: TrainingPosition, metrics: TrainingMetrics) -> None:
        """Save if a save is due; postpone it after bad steps until the next good one."""
        self.saver.poll()
        due = max(self.saver.due(before, self._moment()), self.control.stop.timed_save())
        self.due_save = max(self.due_save, due)
        # Nothing waits for the asynchronous save before for the sake of a non-persistent one.
        waits = self.due_save is SaveKind.NON_PERSISTENT and self.saver.is_writing
        if self.due_save and self.monitor.may_save and not waits:
            is_last = self._is_done()
            self._save(metrics, self.due_save is SaveKind.PERSISTENT or is_last)

    def _has_indices(self, batch_size: int) -> bool:
        """Wait for the sample indices of the next batch; return false if the run is to stop."""
        self._begin("a wait for sample indices", counts_work=True)
        wait = self.control.stop.wait_until
        return self.data.indices.ensure_ready(self.consumed_samples, batch_size, wait)

    def _stop(self, reason: StopReason, metrics: TrainingMetrics) -> int:
        """Save unless the last steps were bad, end the run, and return its exit code."""
        message = f"stopped at iteration {self.iteration}: {reason.description}"
        if not self.monitor.may_save:
            message += f". {self._unsaved()}"
        self._save_last(metrics, REMOVAL_SECONDS, reason.is_interruption)
        self.control.stop.acknowledge(reason)
        print_rank_0(message)
        metrics.end(self.iteration, self.consumed_samples, "stopped", reason.description)
        return reason.exit_code

    def _finish(self, metrics: TrainingMetrics) -> None:
        """Save the final checkpoint.

        Raises:
            TrainingError: the last steps were bad, or iterations are missing after rollbacks.
        """
        self._save_last(metrics)
        if not self.monitor.may_save:
            raise TrainingError(f"the run is incomplete: its last step is bad. {self._unsaved()}")
        planned = planned_iterations(self.run)
        if self.iteration < planned:
            raise TrainingError(
                f"the run ended at iteration {self.iteration} of {planned}: no training data is "
                f"left, because {count_rollbacks(self.run)} rollback(s) skipped batches. The last "
                f"checkpoint is {self._newest_checkpoint()}. Add data to the folds, or accept the "
                f"shorter run with --train-iters {self.iteration}"
            )
        metrics.end(self.iteration, self.consumed_samples, "done", "all iterations are done")

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return float(self.model.optimizer.param_groups[0]["lr"])

    def _begin(self, phase: str, counts_work: bool = False) -> None:
        self.control.watchdog.begin(self.iteration, phase, counts_work)

    def _stop_reason(self) -> StopReason:
        """Return the reason for all ranks to stop after this iteration, if any."""
        agreed = self.control.stop.agreed()
        due = self._is_due(self.run.config.faults.exit_interval)
        return agreed or (StopReason.INTERVAL if due else StopReason.NONE)

    @property
    def _end(self) -> int:
        return self.sizes.consumed_after(self.run.train_iters)

    def _batches(self) -> list[Iterator[Batch]]:
        dataset, config, first = self.data.training, self.run.config, self.consumed_samples
        return batch_iterators(dataset, config, self.device, first, self._end, self.sizes.at)

    def _metrics(self, writers: MetricsWriters | None) -> TrainingMetrics:
        run = self.run
        return TrainingMetrics(
            run.config,
            run.schedule,
            self.sizes,
            run.train_iters,
            self.device,
            writers,
            planned_iterations(run),
            count_rollbacks(run),
            self.instruments.stragglers,
            self.instruments.predictor,
            ExpertMonitor(self.model.chunks, run.config) if run.config.model.has_experts else None,
        )

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and (self.iteration % interval == 0)

    def _is_done(self) -> bool:
        """Return whether less than one full batch of the run is left."""
        return self.consumed_samples + self.sizes.at(self.consumed_samples) > self._end

    def _log(
        self, metrics: TrainingMetrics, result: StepResult, learning_rate: float, batch_size: int
    ) -> None:
        optimizer, log_norm = self.model.optimizer, self.run.config.logging.log_params_norm
        metrics.log(
            self.iteration,
            self.consumed_samples,
            result,
            learning_rate,
            batch_size,
            float(optimizer.get_loss_scale()),
            parameter_norm(optimizer) if log_norm else None,
        )

    def _validate(self, metrics: TrainingMetrics) -> None:
        config, stop = self.run.config, self.control.stop
        if self.data.validation and config.training.eval_iters:
            self._begin("a validation")
            with self.garbage.around_validation():
                losses = evaluate(
                    self.model.chunks,
                    self.data.validation,
                    config,
                    self.device,
                    should_stop=lambda: bool(stop.agreed()),
                    beat=self.control.sync.beat,
                )
            if losses:
                metrics.log_validation(self.iteration, self.consumed_samples, losses)

    def _moment(self) -> TrainingPosition:
        return TrainingPosition(self.iteration, self.consumed_samples)

    def _save_last(
        self,
        metrics: TrainingMetrics,
        removal_seconds: float = REMOVAL_WAIT_SECONDS,
        is_interrupted: bool = False,
    ) -> None:
        """Save the current iteration if it is not saved yet, unless the last steps were bad."""
        settings = self.run.config.checkpoint
        if settings.save and self.saver.saved != self.iteration and self.monitor.may_save:
            self._save(metrics, not (is_interrupted and settings.non_persistent_save_minutes))
        self.saver.close(removal_seconds)

    def _save(self, metrics: TrainingMetrics, persistent: bool) -> None:
        run, model = self.run, self.model
        self._begin("a save")
        self.due_save = SaveKind.NONE
        gather_parameters(model.chunks, run.config)
        progress = SaveProgress(
            self.iteration,
            self.consumed_samples,
            folds=run.schedule.consumed_folds(self.consumed_samples),
            skips=run.schedule.skips,
            history=run.history,
            metrics=metrics.last,
            persistent=persistent,
            fold_file=dump_fold_file(run.folds),
        )
        counters = {
            METRICS_STATE: metrics.state_dict(),
            GRADIENT_NORMS_STATE: list(self.monitor.history),
            GRADIENT_MONITOR_STATE: self.monitor.state_dict(),
        }
        state = RunState(model.chunks, model.optimizer, model.scheduler, counters)
        self.saver.save(state, progress)
        kind = SaveKind.PERSISTENT if persistent else SaveKind.NON_PERSISTENT
        self.control.stop.restart_save_clock(kind)

    def _report_bad_step(
        self, result: StepResult, batch_size: int, metrics: TrainingMetrics, limit_reached: bool
    ) -> None:
        """Print and log a bad step or spike on the first rank."""
        if process_groups.is_first_rank():
            batch = range(self.consumed_samples - batch_size, self.consumed_samples)
            message = describe_bad_step(
                self.run, self.monitor, self.iteration, batch, result.grad_norm, limit_reached
            )
            print_rank_0(f"warning: {message}")
            metrics.event("bad step", self.iteration, self.consumed_samples, why=message)

    def _limit_reached(self) -> bool:
        """Return whether the limit of bad steps, skipped spikes or rollbacks is reached."""
        recent = count_recent_rollbacks(self.run, self.sizes, self.iteration)
        is_last = recent >= self.run.config.faults.max_rollbacks
        return self.monitor.limit_reached or (self.monitor.needs_rollback and is_last)

    def _fail(self, result: StepResult) -> None:
        """End the run after its last good checkpoint is complete.

        Raises:
            TrainingError: always; the message gives the limit and the checkpoint.
        """
        self.saver.may_remove = False
        self.saver.wait()
        recent = count_recent_rollbacks(self.run, self.sizes, self.iteration)
        cause = describe_failure(self.run, self.monitor, self.iteration, result.grad_norm, recent)
        raise TrainingError(f"{cause}. {self._unsaved()}")

    def _unsaved(self) -> str:
        """Return a message on the steps that are not saved and the last good checkpoint."""
        newest, bad = self._newest_checkpoint(), self.monitor.not_applied
        last = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if bad == 0:
            return f"Nothing was saved since: {last}"
        steps = (
            "step was not applied and is" if bad == 1 else f"{bad} steps were not applied and are"
        )
        return f"The last {steps} not saved; {last}"

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint of the run, or the one that it started from."""
        save = self.run.config.checkpoint.save
        with suppress(UserError):  # the folder cannot be read
            if save is not None and (iterations := manifests.complete_iterations(Path(save))):
                tracked, _ = manifests.read_tracker(Path(save))
                newest = tracked if tracked in iterations else iterations[-1]
                return Path(save) / manifests.folder_name(newest)
        return self.run.resume.folder if self.run.resume is not None else None

    def _rollback(self, batch_size: int) -> Rollback:
        """Return the rollback for a spike: the batches to skip after the last checkpoint."""
        self.saver.wait()
        schedule, faults = self.run.schedule, self.run.config.faults
        first = self.sizes.consumed_after(max(0, self.iteration - faults.spike_skip_iterations))
        # Only batches that the checkpoint was not trained on can be skipped.
        saved = self.saver.published_samples
        after = saved if saved is not None else initial_progress(self.run)[1]
        start = schedule.position(max(after, min(first, self.consumed_samples - batch_size)))
        return Rollback(self.iteration, (start, schedule.position(self.consumed_samples - 1) + 1))


def _close(writers: MetricsWriters | None) -> None:
    if writers:
        writers.close()
