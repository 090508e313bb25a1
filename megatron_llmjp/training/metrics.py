"""The numbers of an interval: gathered step by step, worked out when a line is due."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.estimate.flops import compute_dtype, tflops_per_device
from megatron_llmjp.estimate.gpus import peak_tflops
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.batch_iterator import dataset_names
from megatron_llmjp.training.evaluation import describe, perplexity
from megatron_llmjp.training.gradient_monitor import Verdict
from megatron_llmjp.training.log_writers import Record, Writers, interval_line
from megatron_llmjp.training.train_step import (
    DATASETS,
    LM_LOSS,
    Z_LOSS,
    StepResult,
    means_over_ranks,
)


@dataclass
class _Interval:
    """What was gathered since the last line."""

    sums: torch.Tensor | None = None
    """Losses of the steps whose update was applied."""
    skipped_sums: torch.Tensor | None = None
    """Losses of the others: logged only where there is no step of the first kind."""
    steps: int = 0
    samples: int = 0
    skipped: int = 0
    nan: int = 0
    spikes: int = 0


SUMS = ("sums", "skipped_sums")
EVENTFUL = ("skipped", "nan", "spikes")
"""Counted over the interval and over the run."""
COUNTERS = ("steps", "samples", *EVENTFUL)


def _tensor_parallel_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


class Metrics:
    """Gathers over an interval and writes on the first rank.

    Losses stay on the device until a line is due: logging is the only place that waits for them.

    Args:
        config: the run.
        schedule: its data.
        sizes: which iteration has how many samples.
        train_iters: where it ends.
        planned_iters: where it would end if no rollback had skipped batches.
        rollbacks: how many there were.
        device: what it runs on.
        writers: where metrics go; None on all ranks but the first.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        sizes: BatchSizeSchedule,
        train_iters: int,
        device: Device,
        writers: Writers | None,
        planned_iters: int,
        rollbacks: int,
    ) -> None:
        self._config = config
        self._schedule = schedule
        self._planned_iters = planned_iters
        self._rollbacks = rollbacks
        self._end = sizes.consumed_after(train_iters)
        self._device = device
        self._writers = writers
        self._names = dataset_names(schedule)
        self._peak = config.logging.gpu_peak_tflops or peak_tflops(
            device.name, compute_dtype(config)
        )
        self._fold: str | None = None
        self._interval = _Interval()
        self._totals = dict.fromkeys(EVENTFUL, 0)
        self._since = self._paused_at = time.perf_counter()
        self.last: dict[str, float] = {}
        """The last known values that a checkpoint remembers; all are finite."""

    def start(self, iteration: int, consumed: int) -> None:
        """Tell that a process goes on from here."""
        self.event("start", iteration, consumed)
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The interval so far, as plain data, for a checkpoint; all ranks call it."""
        interval = self._interval
        state: dict[str, Any] = {name: getattr(interval, name) for name in COUNTERS}
        state["totals"] = dict(self._totals)
        for name in SUMS:
            sums = getattr(interval, name)
            if sums is not None:
                total = sums.double()
                dist.all_reduce(total)
                # Tensor-parallel ranks counted the same tokens.
                state[name] = (total / _tensor_parallel_size()).tolist()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an interval that a checkpoint cut in two; older checkpoints count less."""
        self._interval = _Interval(**{name: state.get(name, 0) for name in COUNTERS})
        self._totals |= state.get("totals", {})
        for name in SUMS:
            if name not in state:
                continue
            total = torch.tensor(state[name], dtype=torch.float64, device=self._device.torch)
            # One rank holds the sums; the others hold zeros, so that all know there are some.
            is_first = dist.get_rank() == 0
            held = total * _tensor_parallel_size() if is_first else torch.zeros_like(total).float()
            setattr(self._interval, name, held)

    def add(
        self, iteration: int, consumed: int, result: StepResult, samples: int, verdict: Verdict
    ) -> None:
        """Count the step of an iteration, after which ``consumed`` samples are trained on.

        The losses of a step that was not applied stay out of the interval's means: a NaN among them
        would hide the others.
        """
        interval = self._interval
        name = "sums" if result.updated else "skipped_sums"
        sums = getattr(interval, name)
        setattr(interval, name, result.sums if sums is None else sums + result.sums)
        interval.steps += 1
        interval.samples += samples
        interval.skipped += not result.updated
        interval.nan += verdict is Verdict.BAD
        interval.spikes += verdict is Verdict.SPIKE
        fold = self._schedule.fold_of_sample(consumed - 1).name
        if fold != self._fold:
            self.event("fold", iteration, consumed, fold=fold)
        self._fold = fold

    def pause(self) -> None:
        """Leave out of the step time what follows until :meth:`go_on`: a save or a validation."""
        self._paused_at = time.perf_counter()

    def go_on(self) -> None:
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
        means = means_over_ranks(sums)
        seconds = time.perf_counter() - self._since
        values: dict[str, float] = {
            "lm loss": means[LM_LOSS],
            "grad norm": result.grad_norm,
            "learning rate": learning_rate,
            "global batch size": batch_size,
            "loss scale": loss_scale,
            "skipped iterations": interval.skipped,
            "nan iterations": interval.nan,
            "spikes": interval.spikes,
            **self._totals_with(interval),
            **self._speed(interval, seconds, consumed),
        }
        if self._config.training.z_loss_strength > 0.0:
            values["z loss"] = means[Z_LOSS]
        if parameter_norm is not None:
            values["params norm"] = parameter_norm
        remembered = {name: values[name] for name in ("lm loss", "tokens per second")}
        self.last |= {name: value for name, value in remembered.items() if math.isfinite(value)}
        if self._writers:
            self._write(iteration, consumed, values, means[DATASETS:])
        self._interval = _Interval()
        self._since = time.perf_counter()

    def log_validation(self, iteration: int, consumed: int, losses: dict[str, float]) -> None:
        """Write validation losses."""
        if not self._writers:
            return
        print(describe(losses, iteration), flush=True)
        values = {f"validation/{name}": loss for name, loss in losses.items()}
        values |= {f"perplexity/{name}": perplexity(loss) for name, loss in losses.items()}
        self._writers.write(self._record(iteration, consumed, values))

    def _totals_with(self, interval: _Interval) -> dict[str, float]:
        """The run's counts, this interval's included."""
        for name in EVENTFUL:
            self._totals[name] += getattr(interval, name)
        return {
            "total skipped iterations": self._totals["skipped"],
            "total nan iterations": self._totals["nan"],
            "total spikes": self._totals["spikes"],
            "rollbacks": self._rollbacks,
        }

    def _speed(self, interval: _Interval, seconds: float, consumed: int) -> dict[str, float]:
        config = self._config
        speed = interval.samples / seconds
        each = tflops_per_device(config, interval.samples, seconds, dist.get_world_size())
        values = {
            "seconds per iteration": seconds / interval.steps,
            "seconds remaining": (self._end - consumed) / speed,
            "tokens per second": speed * config.data.seq_length,
            "TFLOP/s per GPU": each,
        }
        if self._peak is not None:
            values["MFU"] = each / self._peak
        return values

    def _write(
        self, iteration: int, consumed: int, values: dict[str, float], datasets: list[float]
    ) -> None:
        """Add what the first rank knows by itself, and write."""
        assert self._writers is not None
        fold = self._schedule.fold_of_sample(consumed - 1)
        first, end = self._schedule.sample_range(fold)
        number = self._schedule.folds.index(fold) + 1
        values["fold number"] = number
        values["fold progress"] = (consumed - first) / (end - first)
        values["consumed tokens"] = consumed * self._config.data.seq_length
        shown = f"{fold.name} ({number}/{len(self._schedule.folds)}) {values['fold progress']:.0%}"
        print(interval_line(iteration, self._planned_iters, consumed, values, shown), flush=True)
        values |= self._device.memory()
        values |= self._by_dataset(consumed, datasets)
        self._writers.write(self._record(iteration, consumed, values, fold=fold.name))

    def _by_dataset(self, consumed: int, losses: list[float]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, loss in zip(self._names, losses, strict=False):
            if math.isfinite(loss):  # else it was not in this interval
                values[f"dataset loss/{name}"] = loss
        for (_, name), samples in self._schedule.consumed_by_dataset(consumed).items():
            key = f"consumed tokens/{name}"
            values[key] = values.get(key, 0) + samples * self._config.data.seq_length
        return values

    def event(self, kind: str, iteration: int, consumed: int, **words: str) -> None:
        """Write that something happened."""
        if self._writers:
            self._writers.write(self._record(iteration, consumed, {}, event=kind, **words))

    def end(self, iteration: int, consumed: int, outcome: str, why: str) -> None:
        """Write how the process ended: ``done``, ``stopped`` on request, or ``failed``."""
        self.event("end", iteration, consumed, outcome=outcome, why=why)

    def _record(
        self, iteration: int, consumed: int, values: dict[str, float], **words: str
    ) -> Record:
        tokens = consumed * self._config.data.seq_length
        return Record(iteration, consumed, tokens, values, words)
