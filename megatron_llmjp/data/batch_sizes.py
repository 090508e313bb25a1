"""Iterations and samples: which global batch size an iteration has, with batch ramp-up or without.

The arithmetic is that of megatron-core's ``num_microbatches_calculator`` (``--rampup-batch-size
START INCREMENT SAMPLES``): the batch grows from START to ``global_batch_size`` by INCREMENT after
each equal part of SAMPLES. The calculator itself is not used: importing it imports torch, it knows
only one direction (samples -> size), and it wants a data-parallel size, which decides nothing here.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from megatron_llmjp.config.schema import Config


@dataclass(frozen=True)
class _Stretch:
    """Iterations of one size, up to the next stretch."""

    first_iteration: int
    """The iteration before its first one has this number; iterations count from 1."""
    first_sample: int
    size: int


class BatchSizes:
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
