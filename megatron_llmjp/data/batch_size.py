"""Global batch size schedule (with batch size ramp-up), and the limits on the length of a run.

The arithmetic is that of megatron-core's ``num_microbatches_calculator`` (``--rampup-batch-size
START INCREMENT SAMPLES``): the batch size grows from START to ``global_batch_size`` by INCREMENT
after each equal part of SAMPLES. The calculator itself is not used: importing it imports torch, it
converts only from samples to sizes, and it requires a data-parallel size, which is irrelevant here.

The first limit that is reached ends a run. Units are those of Megatron-LM and Megatron-DeepSpeed:
``train_samples`` ends at the last full batch, ``train_tokens`` after the batch that reaches it.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from megatron_llmjp.config.schema import Config


@dataclass(frozen=True)
class _Segment:
    """Consecutive iterations with the same global batch size."""

    first_iteration: int
    """Number of iterations before this segment."""
    first_sample: int
    size: int


class BatchSizeSchedule:
    """Global batch size as a function of consumed samples.

    It depends only on the configuration, so iterations are the same in every parallel layout.
    """

    def __init__(self, config: Config) -> None:
        self._full = config.training.global_batch_size
        self._ramp = config.training.rampup_batch_size
        self._segments = [_Segment(0, 0, self.at(0))]
        while (last := self._segments[-1]).size < self._full:
            self._segments.append(self._after(last))

    def at(self, consumed_samples: int) -> int:
        """Return the size of the global batch that follows ``consumed_samples``."""
        if self._ramp is None:
            return self._full
        start, increment, samples = self._ramp
        if consumed_samples > samples or start >= self._full:
            return self._full
        increments = (self._full - start) // increment
        # In floating point as in megatron-core, so that each size starts at the same sample.
        return start + int(consumed_samples / (samples / increments)) * increment

    def consumed_after(self, iteration: int) -> int:
        """Return the samples consumed by the end of ``iteration`` (from 1; 0 is the start)."""
        segment = self._find(iteration, "first_iteration")
        return segment.first_sample + (iteration - segment.first_iteration) * segment.size

    def iterations(self, total_samples: int) -> tuple[int, int]:
        """Return the number of full iterations in ``total_samples``, and the remaining samples."""
        segment = self._find(total_samples, "first_sample")
        full, rest = divmod(total_samples - segment.first_sample, segment.size)
        return segment.first_iteration + full, rest

    def iteration_of(self, sample: int) -> int:
        """Return the iteration (from 1) that trains on sample ``sample`` (from 0)."""
        return self.iterations(sample)[0] + 1

    def sizes(self) -> list[int]:
        """Return all sizes that occur, in ascending order."""
        return [segment.size for segment in self._segments]

    def _after(self, segment: _Segment) -> _Segment:
        """Return the segment that follows ``segment``."""
        assert self._ramp is not None
        possible = range(segment.first_sample, self._ramp[2] + 2)
        grown = possible[bisect.bisect_right(possible, segment.size, key=self.at)]
        iterations = -((segment.first_sample - grown) // segment.size)
        consumed = segment.first_sample + iterations * segment.size
        return _Segment(segment.first_iteration + iterations, consumed, self.at(consumed))

    def _find(self, value: int, by: str) -> _Segment:
        place = bisect.bisect_right(self._segments, value, key=lambda s: int(getattr(s, by)))
        return self._segments[place - 1]


@dataclass(frozen=True)
class RunLimit:
    """A limit on the length of a run."""

    name: str
    """The configuration field that sets it."""
    value: int
    iteration: int
    """The last iteration within the limit."""
    samples: int
    """Number of samples required to reach it."""

    def __str__(self) -> str:
        return f"{self.name} {self.value:,}"


def run_limits(config: Config, sizes: BatchSizeSchedule) -> list[RunLimit]:
    """Return the configured limits in the order in which they are reached."""
    training, found = config.training, []
    if training.train_iters is not None:
        iters = training.train_iters
        found.append(RunLimit("train_iters", iters, iters, sizes.consumed_after(iters)))
    if training.train_samples is not None:
        samples = training.train_samples
        iteration, rest = sizes.iterations(samples)
        found.append(RunLimit("train_samples", samples, iteration, samples - rest))
    if training.train_tokens is not None:
        samples = math.ceil(training.train_tokens / config.data.seq_length)
        iteration, rest = sizes.iterations(samples)
        last = iteration + (rest > 0)
        found.append(RunLimit("train_tokens", training.train_tokens, last, samples))
    return sorted(found, key=lambda limit: limit.iteration)


def last_iteration(config: Config, sizes: BatchSizeSchedule) -> int | None:
    """Return the iteration of the first limit; None if there is no limit."""
    return min((limit.iteration for limit in run_limits(config, sizes)), default=None)


def planned_samples(config: Config, sizes: BatchSizeSchedule) -> int | None:
    """Return the planned number of samples, even if train_tokens ends the run earlier.

    By default Megatron-LM draws this many samples from its datasets, and decays the learning rate
    and increases the weight decay over this many samples.
    """
    training = config.training
    if training.train_samples is not None:
        return training.train_samples
    end = training.train_iters or last_iteration(config, sizes)
    return None if end is None else sizes.consumed_after(end)
