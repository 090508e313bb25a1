"""The run, readable top to bottom: set up, go on from where it was, and step until the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.removal import REMOVAL_WAIT_SECONDS
from megatron_llmjp.checkpoint.retention import TrainingPosition
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
from megatron_llmjp.training.batch_iterator import dataset_names, feed
from megatron_llmjp.training.evaluation import evaluate
from megatron_llmjp.training.gradient_monitor import (
    Judge,
    Rollback,
    Verdict,
    count,
    count_recent,
    describe_end,
    describe_step,
    planned_iterations,
)
from megatron_llmjp.training.log_writers import Writers
from megatron_llmjp.training.metrics import Metrics
from megatron_llmjp.training.optimizer import complete_parameters, parameter_norm
from megatron_llmjp.training.run_setup import Model, RunData, progress, say
from megatron_llmjp.training.stop_signals import Request
from megatron_llmjp.training.train_step import StepResult, is_finite_on_all_ranks, train_step
from megatron_llmjp.training.watchdog import Watch

METRICS = "metrics"
"""The log's counters in a checkpoint."""

NORMS = "gradient norms"
"""The judge's history in a checkpoint."""

JUDGE = "bad steps"
"""The judge's counters in a checkpoint."""


REMOVAL_SECONDS = 10.0
"""A run that is asked to stop waits so long for the removal of older checkpoints."""


class TrainingError(RunError):
    """A run cannot continue, or has ended without being done: its numbers are bad."""


@dataclass
class Trainer:
    """A run under way on this rank."""

    run: Run
    device: Device
    sizes: BatchSizeSchedule
    model: Model
    data: RunData
    saver: Saver
    watch: Watch
    judge: Judge
    iteration: int
    consumed_samples: int
    """Samples trained on so far: the whole state of the data."""
    save_is_due: bool = False
    """Whether a save waits for the first good step."""

    def train(self) -> int | Rollback:
        """Train to the end of the run, or to where it is to be interrupted.

        Returns:
            The exit code: done, or stopped on request with a checkpoint saved; or where to go back
            to.
        """
        writers = Writers(self.run.config) if process_groups.is_first_rank() else None
        metrics = self._metrics(writers)
        metrics.start(self.iteration, self.consumed_samples)
        if METRICS in self.model.counters:
            metrics.load_state_dict(self.model.counters[METRICS])
        self.judge.load_state_dict(self.model.counters.get(JUDGE, {}))
        try:
            outcome = self._train(metrics)
        except RunError as error:
            metrics.end(self.iteration, self.consumed_samples, "failed", str(error))
            _close(writers)
            raise
        _close(writers)
        return outcome

    def _train(self, metrics: Metrics) -> int | Rollback:
        config, started = self.run.config, self.iteration
        batches, datasets = self._batches(), len(dataset_names(self.run.schedule))
        while not self._is_last():
            learning_rate, before = self.learning_rate(), self._moment()
            batch_size = self.sizes.at(self.consumed_samples)
            if not self._has_indices(batch_size):
                return self._stop(self.watch.guard.agreed(), metrics)
            # A process compiles and connects in its first step, without a heartbeat.
            self._begin("a step", counts_work=self.iteration == started)
            result = self._step(batches, batch_size, datasets)
            if self.judge.verdict in (Verdict.BAD, Verdict.SPIKE):
                gives_up = self._gives_up()
                self._tell_of(result, batch_size, metrics, gives_up)
                if gives_up:
                    self._give_up(result)
                if self.judge.wants_rollback:
                    return self._rollback(batch_size)
            metrics.add(
                self.iteration, self.consumed_samples, result, batch_size, self.judge.verdict
            )
            if self._is_due(config.logging.log_interval) or self.iteration == started + 1:
                self._log(metrics, result, learning_rate, batch_size)
            metrics.pause()
            if self._is_due(config.training.eval_interval) and not self._is_last():
                self._validate(metrics)
            self._save_if_due(before, metrics)
            request = self._request()
            if request and not self._is_last():
                return self._stop(request, metrics)
            metrics.go_on()
        self._validate(metrics)
        self._finish(metrics)
        return EXIT_DONE

    def _step(self, batches: list[Iterator[Batch]], batch_size: int, datasets: int) -> StepResult:
        """Train on the next global batch and judge it."""
        self.judge.begin_step()
        model, config = self.model, self.run.config
        result = train_step(
            model.chunks,
            model.optimizer,
            model.scheduler,
            batches,
            config,
            batch_size,
            datasets,
            self.judge.may_take,
            self.watch.work.beat,
        )
        if not result.updated and self.judge.verdict is Verdict.GOOD:
            scale = float(model.optimizer.get_loss_scale())
            is_finite = is_finite_on_all_ranks(result.sums)
            self.judge.overflowed(config.optimizer, scale, is_finite)
        self.iteration += 1
        self.consumed_samples += batch_size
        self.saver.may_remove = self.judge.may_save
        return result

    def _save_if_due(self, before: TrainingPosition, metrics: Metrics) -> None:
        """Save where it is due; what is due while steps are bad is saved after the first good."""
        self.saver.poll()
        is_time = self._is_due(self.run.config.logging.log_interval)
        is_due = self.saver.reason(before, self._moment(), is_time) is not None
        self.save_is_due = self.save_is_due or is_due
        if self.save_is_due and self.judge.may_save:
            self._save(metrics)

    def _has_indices(self, batch_size: int) -> bool:
        """Wait for the sample indices of the next batch, unless the run is to stop before."""
        self._begin("a look for sample indices", counts_work=True)
        wait = self.watch.guard.wait_until
        return self.data.indices.ensure_ready(self.consumed_samples, batch_size, wait)

    def _stop(self, request: Request, metrics: Metrics) -> int:
        """End on request, with a checkpoint unless steps are bad; the exit code."""
        why = f"stopped at iteration {self.iteration}: {request.why}"
        if not self.judge.may_save:
            why += f". {self._unsaved()}"
        self._save_last(metrics, REMOVAL_SECONDS)
        self.watch.guard.answered(request)
        say(why)
        metrics.end(self.iteration, self.consumed_samples, "stopped", request.why)
        return request.exit_code

    def _finish(self, metrics: Metrics) -> None:
        """Save the end of the run.

        Raises:
            TrainingError: the run is not done: its last steps are bad, or iterations are missing.
        """
        self._save_last(metrics)
        if not self.judge.may_save:
            raise TrainingError(f"the run is not done at its last iteration. {self._unsaved()}")
        planned = planned_iterations(self.run)
        if self.iteration < planned:
            raise TrainingError(
                f"the run ended at iteration {self.iteration} of {planned}: its data is used up, "
                f"since {count(self.run)} rollback(s) skipped batches. It is saved in "
                f"{self._newest_checkpoint()}. Give the folds more data to train on, or call it "
                f"done with --train-iters {self.iteration}"
            )
        metrics.end(self.iteration, self.consumed_samples, "done", "all iterations are done")

    def learning_rate(self) -> float:
        """The rate that the next step applies."""
        return float(self.model.optimizer.param_groups[0]["lr"])

    def _begin(self, what: str, counts_work: bool = False) -> None:
        self.watch.watchdog.begin(self.iteration, what, counts_work)

    def _request(self) -> Request:
        """Whether all ranks are to stop here."""
        agreed = self.watch.guard.agreed()
        due = self._is_due(self.run.config.faults.exit_interval)
        return agreed or (Request.INTERVAL if due else Request.NONE)

    @property
    def _end(self) -> int:
        return self.sizes.consumed_after(self.run.train_iters)

    def _batches(self) -> list[Iterator[Batch]]:
        dataset, first = self.data.training, self.consumed_samples
        return feed(dataset, self.run.config, self.device, first, self._end, self.sizes.at)

    def _metrics(self, writers: Writers | None) -> Metrics:
        run = self.run
        return Metrics(
            run.config,
            run.schedule,
            self.sizes,
            run.train_iters,
            self.device,
            writers,
            planned_iterations(run),
            count(run),
        )

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and (self.iteration % interval == 0)

    def _is_last(self) -> bool:
        """Whether no full batch is left of the run."""
        return self.consumed_samples + self.sizes.at(self.consumed_samples) > self._end

    def _log(
        self, metrics: Metrics, result: StepResult, learning_rate: float, batch_size: int
    ) -> None:
        optimizer, wanted = self.model.optimizer, self.run.config.logging.log_params_norm
        metrics.log(
            self.iteration,
            self.consumed_samples,
            result,
            learning_rate,
            batch_size,
            float(optimizer.get_loss_scale()),
            parameter_norm(optimizer) if wanted else None,
        )

    def _validate(self, metrics: Metrics) -> None:
        config, guard = self.run.config, self.watch.guard
        if self.data.validation and config.training.eval_iters:
            self._begin("a validation")
            losses = evaluate(
                self.model.chunks,
                self.data.validation,
                config,
                self.device,
                is_over=lambda: bool(guard.agreed()),
                beat=self.watch.work.beat,
            )
            if losses:
                metrics.log_validation(self.iteration, self.consumed_samples, losses)

    def _moment(self) -> TrainingPosition:
        return TrainingPosition(self.iteration, self.consumed_samples)

    def _save_last(self, metrics: Metrics, removal_seconds: float = REMOVAL_WAIT_SECONDS) -> None:
        """Have the run as it is now on disk, unless steps are bad."""
        has_folder = self.run.config.checkpoint.save is not None
        if has_folder and self.saver.saved != self.iteration and self.judge.may_save:
            self._save(metrics)
        self.saver.close(removal_seconds)

    def _save(self, metrics: Metrics) -> None:
        run, model = self.run, self.model
        self._begin("a save")
        self.save_is_due = False
        complete_parameters(model.chunks, run.config)
        progress = SaveProgress(
            self.iteration,
            self.consumed_samples,
            folds=run.schedule.consumed_folds(self.consumed_samples),
            skips=run.schedule.skips,
            past=run.history,
            metrics=metrics.last,
            fold_file=dump_fold_file(run.folds),
        )
        counters = {
            METRICS: metrics.state_dict(),
            NORMS: list(self.judge.history),
            JUDGE: self.judge.state_dict(),
        }
        state = RunState(model.chunks, model.optimizer, model.scheduler, counters)
        self.saver.save(state, progress)

    def _tell_of(
        self, result: StepResult, batch_size: int, metrics: Metrics, gives_up: bool
    ) -> None:
        """Report a step with bad numbers, on the first rank."""
        if process_groups.is_first_rank():
            batch = range(self.consumed_samples - batch_size, self.consumed_samples)
            norm = result.grad_norm
            words = describe_step(self.run, self.judge, self.iteration, batch, norm, gives_up)
            say(f"warning: {words}")
            metrics.event("bad step", self.iteration, self.consumed_samples, why=words)

    def _gives_up(self) -> bool:
        """Whether a limit of bad steps, spikes or rollbacks is reached."""
        recent = count_recent(self.run, self.sizes, self.iteration)
        is_last = recent >= self.run.config.faults.max_rollbacks
        return self.judge.hopeless or (self.judge.wants_rollback and is_last)

    def _give_up(self, result: StepResult) -> None:
        """End the run, its last good checkpoint being complete.

        Raises:
            TrainingError: always; it names the limit and the checkpoint.
        """
        self.saver.may_remove = False
        self.saver.wait()
        recent = count_recent(self.run, self.sizes, self.iteration)
        why = describe_end(self.run, self.judge, self.iteration, result.grad_norm, recent)
        raise TrainingError(f"{why}. {self._unsaved()}")

    def _unsaved(self) -> str:
        """What is said of a run that ends without being saved."""
        newest, bad = self._newest_checkpoint(), self.judge.not_applied
        kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if bad == 0:
            return f"Nothing was saved since: {kept}"
        steps = (
            "step was not applied and is" if bad == 1 else f"{bad} steps were not applied and are"
        )
        return f"The last {steps} not saved; {kept}"

    def _newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of the run, or the one that it started from."""
        save = self.run.config.checkpoint.save
        with suppress(UserError):  # the folder cannot be read
            if save is not None and (iterations := manifests.complete_iterations(Path(save))):
                tracked, _ = manifests.read_tracker(Path(save))
                newest = tracked if tracked in iterations else iterations[-1]
                return Path(save) / manifests.folder_name(newest)
        return self.run.resume.folder if self.run.resume is not None else None

    def _rollback(self, batch_size: int) -> Rollback:
        self.saver.wait()
        schedule, faults = self.run.schedule, self.run.config.faults
        first = self.sizes.consumed_after(max(0, self.iteration - faults.spike_skip_iterations))
        # What the checkpoint was trained on stays: only batches after it can be skipped.
        saved = self.saver.published_samples
        after = saved if saved is not None else progress(self.run)[1]
        start = schedule.position(max(after, min(first, self.consumed_samples - batch_size)))
        return Rollback(self.iteration, (start, schedule.position(self.consumed_samples - 1) + 1))


def _close(writers: Writers | None) -> None:
    if writers:
        writers.close()
