"""Accumulation of training metrics over log intervals, and their records."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.estimate.flops import compute_dtype, tflops_per_device
from megatron_llmjp.estimate.speed.gpus import peak_tflops
from megatron_llmjp.filesystem import warn
from megatron_llmjp.interval_stats import IntervalStats, RankTimes
from megatron_llmjp.metric_registry import (
    DATASET_LOSS,
    DATASET_TOKENS,
    HARDWARE,
    LAYER_EXPERT_LOAD,
    LM_LOSS,
    PERPLEXITY,
    SLOWEST_HOST,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    interval_values,
    perplexity,
)
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.batch_iterator import dataset_names
from megatron_llmjp.training.expert_monitor import ExpertMonitor
from megatron_llmjp.training.gradient_monitor import StepStatus
from megatron_llmjp.training.log_lines import FoldPosition, LogLines, choose_format
from megatron_llmjp.training.log_writers import MetricsRecord, MetricsWriters
from megatron_llmjp.training.predicted_step import StepPredictor
from megatron_llmjp.training.stragglers import Comparison, StragglerMonitor
from megatron_llmjp.training.train_step import (
    FIRST_DATASET_ROW,
    LM_LOSS_ROW,
    Z_LOSS_ROW,
    StepResult,
    means_over_ranks,
)


@dataclass
class _Interval:
    """Counters and loss sums since the last log line."""

    sums: torch.Tensor | None = None
    """Loss sums of the applied steps."""
    skipped_sums: torch.Tensor | None = None
    """Loss sums of the other steps; logged only if no step of the interval was applied."""
    steps: int = 0
    samples: int = 0
    skipped: int = 0
    nan: int = 0
    spikes: int = 0


SUMS = ("sums", "skipped_sums")
EVENT_COUNTERS = ("skipped", "nan", "spikes")
"""Counters over the interval that are also summed over the run."""
COUNTERS = ("steps", "samples", *EVENT_COUNTERS)

IN_MANIFEST = (LM_LOSS.name, TOKENS_PER_SECOND.name)
"""Metrics that are stored in the manifests of checkpoints."""


def _tensor_parallel_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


class TrainingMetrics:
    """Accumulate metrics over an interval, and write them on the first rank.

    Losses stay on the device until a log line is due: only logging waits for them.

    Args:
        config: the run's configuration.
        schedule: the resolved folds.
        sizes: the batch size of each iteration.
        train_iters: number of iterations of the run.
        device: the device of this rank.
        writers: destinations of the metrics; None except on the first rank.
        planned_iters: number of iterations without the batches that rollbacks skipped.
        rollbacks: number of rollbacks so far.
        stragglers: compares the ranks; None if it is disabled.
        predictor: predicts the step time; None to log no prediction.
        experts: counts the tokens of experts; None without experts.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        sizes: BatchSizeSchedule,
        train_iters: int,
        device: Device,
        writers: MetricsWriters | None,
        planned_iters: int,
        rollbacks: int,
        stragglers: StragglerMonitor | None = None,
        predictor: StepPredictor | None = None,
        experts: ExpertMonitor | None = None,
    ) -> None:
        self._config = config
        self._schedule = schedule
        self._lines = LogLines(choose_format(config.logging.log_format), planned_iters)
        self._rollbacks = rollbacks
        self._stragglers = stragglers
        self._predictor = predictor
        self._experts = experts
        self._end = sizes.consumed_after(train_iters)
        self._device = device
        self._writers = writers
        self._names = dataset_names(schedule)
        self._peak = config.logging.gpu_peak_tflops or peak_tflops(
            device.name, compute_dtype(config)
        )
        self._fold: str | None = None
        self._interval = _Interval()
        self._totals = dict.fromkeys(EVENT_COUNTERS, 0)
        self._since = self._paused_at = time.perf_counter()
        self.last: dict[str, float] = {}
        """Latest finite values of :data:`IN_MANIFEST`, for the manifest of a checkpoint."""

    def start(self, iteration: int, consumed: int, hardware: str = "") -> None:
        """Write the event of a process that starts after this iteration.

        Args:
            iteration: iteration before the first one.
            consumed: consumed samples.
            hardware: devices of all ranks.
        """
        self.event("start", iteration, consumed, **({HARDWARE: hardware} if hardware else {}))
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the interval so far as plain data, for a checkpoint; all ranks call it."""
        interval = self._interval
        state: dict[str, Any] = {name: getattr(interval, name) for name in COUNTERS}
        state["totals"] = dict(self._totals)
        for name in SUMS:
            sums = getattr(interval, name)
            if sums is not None:
                total = sums.double()
                dist.all_reduce(total)
                # Tensor-parallel ranks hold the same sums.
                state[name] = (total / _tensor_parallel_size()).tolist()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore an interval that a checkpoint interrupted; older ones lack some counters."""
        self._interval = _Interval(**{name: state.get(name, 0) for name in COUNTERS})
        self._totals |= state.get("totals", {})
        for name in SUMS:
            if name not in state:
                continue
            total = torch.tensor(state[name], dtype=torch.float64, device=self._device.torch)
            # The first rank holds the sums. The others hold zeros rather than None, so that all
            # ranks agree on whether there are sums.
            is_first = dist.get_rank() == 0
            sums = total * _tensor_parallel_size() if is_first else torch.zeros_like(total).float()
            setattr(self._interval, name, sums)

    def add(
        self, iteration: int, consumed: int, result: StepResult, samples: int, status: StepStatus
    ) -> None:
        """Add the step of an iteration, after which ``consumed`` samples have been consumed.

        Losses of steps that were not applied are kept separately: a NaN would make the means NaN.
        """
        interval = self._interval
        name = "sums" if result.updated else "skipped_sums"
        sums = getattr(interval, name)
        setattr(interval, name, result.sums if sums is None else sums + result.sums)
        interval.steps += 1
        interval.samples += samples
        interval.skipped += not result.updated
        interval.nan += status is StepStatus.BAD
        interval.spikes += status is StepStatus.SPIKE
        fold = self._schedule.fold_of_sample(consumed - 1).name
        if fold != self._fold:
            self.event("fold", iteration, consumed, fold=fold)
        self._fold = fold

    def pause(self) -> None:
        """Exclude the time until :meth:`resume` from the step time: saves and validations."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """End a pause."""
        self._since += time.perf_counter() - self._paused_at

    def log(
        self,
        iteration: int,
        consumed: int,
        result: StepResult,
        learning_rate: float,
        batch_size: int,
        loss_scale: float,
        parameter_norm: float | None,
    ) -> None:
        """Write the interval that ends with this iteration; all ranks call it."""
        interval = self._interval
        sums = interval.sums if interval.sums is not None else interval.skipped_sums
        assert sums is not None
        own = self._stragglers.own if self._stragglers is not None else ()
        means, of_ranks = means_over_ranks(sums, own)
        for name in EVENT_COUNTERS:
            self._totals[name] += getattr(interval, name)
        fold = self._schedule.fold_of_sample(consumed - 1)
        ranks = self._compare_ranks(of_ranks, iteration, consumed)
        stats = self._stats(
            consumed,
            means,
            result,
            learning_rate,
            batch_size,
            loss_scale,
            parameter_norm,
            ranks.times if ranks is not None else None,
        )
        values = interval_values(stats)
        latest = {name: values[name] for name in IN_MANIFEST}
        self.last |= {name: value for name, value in latest.items() if math.isfinite(value)}
        if self._writers:
            folds = len(self._schedule.folds)
            position = FoldPosition(fold.name, stats.fold_number, folds, stats.fold_progress)
            print(self._lines.interval(iteration, consumed, values, position), flush=True)
            values |= self._by_dataset(consumed, means[FIRST_DATASET_ROW:])
            loads = stats.experts.load.items() if stats.experts is not None else ()
            values |= {LAYER_EXPERT_LOAD.key(f"layer {i}"): load for i, load in loads}
            hosts = {SLOWEST_HOST: ranks.hosts} if ranks is not None and ranks.hosts else {}
            record = self._record(iteration, consumed, values, fold=fold.name, **hosts)
            tokens = stats.experts.tokens if stats.experts is not None else {}
            self._writers.write(replace(record, expert_tokens=tokens))
        self._interval = _Interval()
        self._since = time.perf_counter()

    def _compare_ranks(
        self, of_ranks: list[list[float]], iteration: int, consumed: int
    ) -> Comparison | None:
        """Compare the times of all ranks on the first rank, and report a straggler."""
        if self._stragglers is None or self._writers is None:
            return None
        found = self._stragglers.compare(of_ranks)
        if found is not None and found.warning:
            warn(f"iteration {iteration}: {found.warning}")
            self.event("straggler", iteration, consumed, host=found.hosts, why=found.warning)
        if found is not None and found.note:
            print(f"note: iteration {iteration}: {found.note}", flush=True)
        return found

    def _stats(
        self,
        consumed: int,
        means: list[float],
        result: StepResult,
        learning_rate: float,
        batch_size: int,
        loss_scale: float,
        parameter_norm: float | None,
        rank_times: RankTimes | None,
    ) -> IntervalStats:
        """Return the measurements of the current interval."""
        interval, config = self._interval, self._config
        seconds = time.perf_counter() - self._since
        fold = self._schedule.fold_of_sample(consumed - 1)
        first, end = self._schedule.sample_range(fold)
        return IntervalStats(
            steps=interval.steps,
            samples=interval.samples,
            seconds=seconds,
            consumed_samples=consumed,
            remaining_samples=self._end - consumed,
            sequence_length=config.data.seq_length,
            lm_loss=means[LM_LOSS_ROW],
            z_loss=means[Z_LOSS_ROW] if config.training.z_loss_strength > 0.0 else None,
            grad_norm=result.grad_norm,
            params_norm=parameter_norm,
            learning_rate=learning_rate,
            global_batch_size=batch_size,
            loss_scale=loss_scale,
            skipped=interval.skipped,
            nan=interval.nan,
            spikes=interval.spikes,
            total_skipped=self._totals["skipped"],
            total_nan=self._totals["nan"],
            total_spikes=self._totals["spikes"],
            rollbacks=self._rollbacks,
            tflops_per_gpu=tflops_per_device(
                config, interval.samples, seconds, dist.get_world_size()
            ),
            peak_tflops=self._peak,
            fold_number=self._schedule.folds.index(fold) + 1,
            fold_progress=(consumed - first) / (end - first),
            memory=self._device.memory(),
            rank_times=rank_times,
            experts=self._experts.take() if self._experts is not None else None,
            predicted=self._predictor(batch_size) if self._predictor is not None else None,
        )

    def log_validation(self, iteration: int, consumed: int, losses: dict[str, float]) -> None:
        """Write validation losses."""
        if not self._writers:
            return
        print(self._lines.validation(iteration, losses), flush=True)
        values = {VALIDATION_LOSS.key(name): loss for name, loss in losses.items()}
        values |= {PERPLEXITY.key(name): perplexity(loss) for name, loss in losses.items()}
        self._writers.write(self._record(iteration, consumed, values))

    def _by_dataset(self, consumed: int, losses: list[float]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, loss in zip(self._names, losses, strict=False):
            if math.isfinite(loss):  # NaN if the interval has no samples of the dataset
                values[DATASET_LOSS.key(name)] = loss
        for (_, name), samples in self._schedule.consumed_by_dataset(consumed).items():
            key = DATASET_TOKENS.key(name)
            values[key] = values.get(key, 0) + samples * self._config.data.seq_length
        return values

    def event(self, kind: str, iteration: int, consumed: int, **strings: str) -> None:
        """Write an event."""
        if self._writers:
            self._writers.write(self._record(iteration, consumed, {}, event=kind, **strings))

    def end(self, iteration: int, consumed: int, outcome: str, why: str) -> None:
        """Write the end of the process: ``done``, ``stopped`` on request, or ``failed``."""
        self.event("end", iteration, consumed, outcome=outcome, why=why)

    def _record(
        self, iteration: int, consumed: int, values: dict[str, float], **strings: str
    ) -> MetricsRecord:
        tokens = consumed * self._config.data.seq_length
        return MetricsRecord(iteration, consumed, tokens, values, strings)
