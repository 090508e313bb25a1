"""Global batch size by iteration, and the iteration at which a run ends.

Iterations and samples: which global batch size an iteration has, with batch ramp-up or without.

The arithmetic is that of megatron-core's ``num_microbatches_calculator`` (``--rampup-batch-size
START INCREMENT SAMPLES``): the batch grows from START to ``global_batch_size`` by INCREMENT after
each equal part of SAMPLES. The calculator itself is not used: importing it imports torch, it knows
only one direction (samples -> size), and it wants a data-parallel size, which decides nothing here.

Length of a run: the iteration at which train_iters, train_samples or train_tokens ends it.

Whichever is reached first ends the run. The units count as in Megatron-LM and Megatron-DeepSpeed:
samples end at the last full batch, tokens with the first batch that reaches them.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from megatron_llmjp.config.schema import Config


@dataclass(frozen=True)
class _Stretch:
    """Iterations of one size, up to the next stretch."""

    first_iteration: int
    """The iteration before its first one has this number; iterations count from 1."""
    first_sample: int
    size: int


class BatchSizeSchedule:
    """The global batch size as a function of the samples trained on.

    It depends on nothing but the configuration, so that every layout has the same iterations.
    """

    def __init__(self, config: Config) -> None:
        self._full = config.training.global_batch_size
        self._ramp = config.training.rampup_batch_size
        self._stretches = [_Stretch(0, 0, self.at(0))]
        while (last := self._stretches[-1]).size < self._full:
            self._stretches.append(self._after(last))

    def at(self, consumed_samples: int) -> int:
        """The size of the global batch that begins after ``consumed_samples``."""
        if self._ramp is None:
            return self._full
        start, increment, samples = self._ramp
        if consumed_samples > samples or start >= self._full:
            return self._full
        increments = (self._full - start) // increment
        # In floating point, as megatron-core does it: a size begins at the same sample.
        return start + int(consumed_samples / (samples / increments)) * increment

    def consumed_after(self, iteration: int) -> int:
        """Samples trained on when iteration ``iteration`` (from 1; 0 is the start) is done."""
        stretch = self._find(iteration, "first_iteration")
        return stretch.first_sample + (iteration - stretch.first_iteration) * stretch.size

    def iterations(self, total_samples: int) -> tuple[int, int]:
        """Full iterations that ``total_samples`` give, and the samples that are left over."""
        stretch = self._find(total_samples, "first_sample")
        full, rest = divmod(total_samples - stretch.first_sample, stretch.size)
        return stretch.first_iteration + full, rest

    def iteration_of(self, sample: int) -> int:
        """The iteration (from 1) that trains on sample number ``sample`` (from 0)."""
        return self.iterations(sample)[0] + 1

    def sizes(self) -> list[int]:
        """All sizes that occur, ascending."""
        return [stretch.size for stretch in self._stretches]

    def _after(self, stretch: _Stretch) -> _Stretch:
        """The first iterations of a larger size."""
        assert self._ramp is not None
        possible = range(stretch.first_sample, self._ramp[2] + 2)
        grown = possible[bisect.bisect_right(possible, stretch.size, key=self.at)]
        iterations = -((stretch.first_sample - grown) // stretch.size)
        consumed = stretch.first_sample + iterations * stretch.size
        return _Stretch(stretch.first_iteration + iterations, consumed, self.at(consumed))

    def _find(self, value: int, by: str) -> _Stretch:
        place = bisect.bisect_right(self._stretches, value, key=lambda s: int(getattr(s, by)))
        return self._stretches[place - 1]


@dataclass(frozen=True)
class RunLimit:
    """One limit of a run."""

    name: str
    """The field that sets it."""
    value: int
    iteration: int
    """The last iteration within the limit."""
    samples: int
    """Samples that the data must hold for it."""

    def __str__(self) -> str:
        return f"{self.name} {self.value:,}"


def run_limits(config: Config, sizes: BatchSizeSchedule) -> list[RunLimit]:
    """The limits that a configuration sets, the first to be reached first."""
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
    """The iteration that the first limit ends the run at; None without a limit."""
    return min((limit.iteration for limit in run_limits(config, sizes)), default=None)


def planned_samples(config: Config, sizes: BatchSizeSchedule) -> int | None:
    """Samples that a run is planned for, whether or not train_tokens ends it earlier.

    Megatron-LM draws so many samples from its datasets, and decays the learning rate and raises the
    weight decay over as many, where nothing else is given.
    """
    training = config.training
    if training.train_samples is not None:
        return training.train_samples
    end = training.train_iters or last_iteration(config, sizes)
    return None if end is None else sizes.consumed_after(end)
