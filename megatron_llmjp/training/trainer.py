"""The run, readable top to bottom: set up, go on from where it was, and step until the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llmjp.checkpoint.retention import Moment
from megatron_llmjp.checkpoint.saver import Saver
from megatron_llmjp.checkpoint.saving import Progress
from megatron_llmjp.checkpoint.store import RunState
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.fold_copy import dump_fold_file
from megatron_llmjp.data.loader import Batch
from megatron_llmjp.errors import EXIT_DONE, RunError
from megatron_llmjp.prepare import Run
from megatron_llmjp.runtime import distributed
from megatron_llmjp.runtime.device import Device
from megatron_llmjp.training.bad_numbers import Judge, Verdict
from megatron_llmjp.training.build import Model, RunData, say
from megatron_llmjp.training.evaluate import evaluate
from megatron_llmjp.training.feed import dataset_names, feed
from megatron_llmjp.training.guard import Request
from megatron_llmjp.training.metrics import Metrics
from megatron_llmjp.training.mishaps import describe_step
from megatron_llmjp.training.norms import parameter_norm
from megatron_llmjp.training.optimizer import complete_parameters
from megatron_llmjp.training.step import StepResult, train_step
from megatron_llmjp.training.watch import Watch
from megatron_llmjp.training.writers import Writers

METRICS = "metrics"
"""The log's counters in a checkpoint."""

NORMS = "gradient norms"
"""The judge's history in a checkpoint."""


class TrainingError(RunError):
    """Training cannot go on: the numbers are no numbers any more."""


@dataclass(frozen=True)
class Rollback:
    """A wish to go back to the last checkpoint, and to leave out what led to a spike."""

    iteration: int
    positions: tuple[int, int]
    """Of the schedule, half open."""


@dataclass
class Trainer:
    """A run under way on this rank."""

    run: Run
    device: Device
    sizes: BatchSizes
    model: Model
    data: RunData
    saver: Saver
    watch: Watch
    judge: Judge
    iteration: int
    consumed_samples: int
    """Samples trained on so far: the whole state of the data."""

    def train(self) -> int | Rollback:
        """Train to the end of the run, or to where it is to be interrupted.

        Returns:
            The exit code: done, or stopped on request with a checkpoint saved; or where to go back
            to.
        """
        config = self.run.config
        writers = Writers(config) if distributed.is_first_rank() else None
        metrics = self._metrics(writers)
        metrics.start(self.iteration, self.consumed_samples)
        if METRICS in self.model.counters:
            metrics.load_state_dict(self.model.counters[METRICS])
        started = self.iteration
        names = len(dataset_names(self.run.schedule))
        batches = self._batches()
        while not self._is_last():
            learning_rate, before = self.learning_rate(), self._moment()
            batch_size = self.sizes.at(self.consumed_samples)
            self._begin("a step")
            self.judge.begin_step()
            self.data.indices.before(self.consumed_samples, batch_size)
            result = train_step(
                self.model.chunks,
                self.model.optimizer,
                self.model.scheduler,
                batches,
                config,
                batch_size,
                names,
                self.judge.may_take,
            )
            self.iteration += 1
            self.consumed_samples += batch_size
            if self.judge.verdict is not Verdict.GOOD:
                self._tell_of(result, batch_size, metrics)
                if self.judge.wants_rollback:
                    self.saver.wait()
                    _close(writers)
                    return self._rollback(batch_size)
            metrics.add(self.iteration, self.consumed_samples, result, batch_size)
            if self._is_due(config.logging.log_interval) or self.iteration == started + 1:
                self._log(metrics, result, learning_rate, batch_size)
            metrics.pause()
            if self._is_due(config.training.eval_interval) and not self._is_last():
                self._validate(metrics)
            self.saver.poll()
            if self.saver.reason(before, self._moment(), self._is_due(config.logging.log_interval)):
                self._save(metrics)
            request = self._request()
            if request and not self._is_last():
                self._save_last(metrics)
                self.watch.guard.answered(request)
                say(f"stopped at iteration {self.iteration}: {request.why}")
                _close(writers)
                return request.exit_code
            metrics.go_on()
        self._validate(metrics)
        self._save_last(metrics)
        _close(writers)
        return EXIT_DONE

    def learning_rate(self) -> float:
        """The rate that the next step applies."""
        return float(self.model.optimizer.param_groups[0]["lr"])

    def _begin(self, what: str) -> None:
        self.watch.watchdog.beat(self.iteration, what)

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
        return Metrics(run.config, run.schedule, self.sizes, run.train_iters, self.device, writers)

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
            )
            if losses:
                metrics.log_validation(self.iteration, self.consumed_samples, losses)

    def _moment(self) -> Moment:
        return Moment(self.iteration, self.consumed_samples)

    def _save_last(self, metrics: Metrics) -> None:
        """Have the run as it is now on disk."""
        if self.run.config.checkpoint.save is not None and self.saver.saved != self.iteration:
            self._save(metrics)
        self.saver.close()

    def _save(self, metrics: Metrics) -> None:
        run, model = self.run, self.model
        self._begin("a save")
        complete_parameters(model.chunks, run.config)
        progress = Progress(
            self.iteration,
            self.consumed_samples,
            folds=run.schedule.touched(self.consumed_samples),
            skips=run.schedule.skips,
            past=run.past,
            metrics=metrics.last,
            fold_file=dump_fold_file(run.folds),
        )
        counters = {METRICS: metrics.state_dict(), NORMS: list(self.judge.history)}
        state = RunState(model.chunks, model.optimizer, model.scheduler, counters)
        self.saver.save(state, progress)

    def _tell_of(self, result: StepResult, batch_size: int, metrics: Metrics) -> None:
        """Tell of a step with bad numbers.

        Raises:
            TrainingError: it was one too many.
        """
        if distributed.is_first_rank():
            batch = range(self.consumed_samples - batch_size, self.consumed_samples)
            words = describe_step(self.run, self.judge, self.iteration, batch, result.grad_norm)
            say(f"warning: {words}")
            metrics.event("bad step", self.iteration, self.consumed_samples, why=words)
        if self.judge.hopeless:
            raise TrainingError(
                f"iteration {self.iteration} was the last of too many bad steps in a row "
                "(--max-bad-steps); the last checkpoint is untouched"
            )

    def _rollback(self, batch_size: int) -> Rollback:
        schedule, faults = self.run.schedule, self.run.config.faults
        first = self.sizes.consumed_after(max(0, self.iteration - faults.spike_skip_iterations))
        start = schedule.position(min(first, self.consumed_samples - batch_size))
        return Rollback(self.iteration, (start, schedule.position(self.consumed_samples - 1) + 1))


def _close(writers: Writers | None) -> None:
    if writers:
        writers.close()
