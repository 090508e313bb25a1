"""Computing and waiting time of this rank in each step, through megatron-core's ``timers`` hook.

megatron-core's schedules call ``config.timers(NAME).start()`` and ``.stop()`` around the forward
and the backward pass of each micro-batch, and around the whole schedule with its communication:
sends and receives between pipeline stages, and the reduction of gradients. All ranks take the same
time for a synchronous step, but a slow rank computes longer, and the others wait for it.

On a GPU the times are those of CUDA events on the stream of the kernels. They are read after the
gradient norm, for which the host waits in every step, so that no further wait is needed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.utils import nvtx_range_pop, nvtx_range_push

COMPUTING = ("forward-compute", "backward-compute")
"""megatron-core's names of the passes of one micro-batch. Communication between tensor- and
context-parallel ranks is part of them, that between pipeline stages is not."""
SCHEDULE = "forward-backward"
"""megatron-core's name of all passes of a step with their communication."""

WINDOW = 20
"""Number of latest steps that the medians are taken of: a single slow step has no effect."""


class StepTimes(NamedTuple):
    """Times of one rank in a step, in seconds."""

    computing: float
    """Forward and backward passes, with the loading of their data."""
    waiting: float
    """The rest of the schedule: communication, and waits for other ranks."""
    total: float = 0.0
    """Duration of the step on the host."""


class Clock(Protocol):
    """Marks of points in time, and the time between two of them."""

    def mark(self) -> Any:
        """Return a mark of now."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks."""

    def reuse(self, marks: list[Any]) -> None:
        """Take back marks that are no longer needed."""


class HostClock:
    """Clock of the host, for operations that are synchronous."""

    def mark(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Return the time between two marks."""
        return end - start

    def reuse(self, marks: list[float]) -> None:
        """Do nothing: marks are numbers."""


class EventClock:
    """CUDA events, recorded in the current stream."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the time between two events that the device has passed."""
        return float(start.elapsed_time(end)) / 1000.0

    def reuse(self, marks: list[torch.cuda.Event]) -> None:
        """Keep events for later marks."""
        self._free += marks


class ComputeTimer:
    """Value of ``timers`` in megatron-core's configuration: measures the steps of this rank.

    Args:
        clock: clock of the device.
        ranges: whether to emit an NVTX range for each timed part.
    """

    def __init__(self, clock: Clock, ranges: bool = False) -> None:
        self._clock, self._with_ranges = clock, ranges
        self._marks: dict[str, list[Any]] = {}
        self._is_active = False
        self._steps: deque[StepTimes] = deque(maxlen=WINDOW)

    def __call__(self, name: str, log_level: int = 0) -> _Part:
        """Return the timer of a part of the schedule, as megatron-core's ``Timers`` does."""
        return _Part(self, name)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step; the host must wait for the gradient norm within it."""
        started, self._is_active = time.perf_counter(), True
        try:
            yield
        finally:
            self._is_active = False
        self._steps.append(self._take()._replace(total=time.perf_counter() - started))

    @property
    def steps(self) -> int:
        """Number of steps that the medians are taken of."""
        return len(self._steps)

    def medians(self) -> StepTimes:
        """Return the medians over the last :data:`WINDOW` steps; zeros before the first."""
        if not self._steps:
            return StepTimes(0.0, 0.0)
        return StepTimes(*(median(times) for times in zip(*self._steps, strict=True)))

    def begin(self, name: str) -> None:
        """Begin a part."""
        if self._with_ranges:
            nvtx_range_push(msg=name)
        self._mark(name)

    def end(self, name: str) -> None:
        """End a part."""
        self._mark(name)
        if self._with_ranges:
            nvtx_range_pop(msg=name)

    def _mark(self, name: str) -> None:
        if self._is_active and (name in COMPUTING or name == SCHEDULE):
            self._marks.setdefault(name, []).append(self._clock.mark())

    def _take(self) -> StepTimes:
        """Return the times of the marks so far, and forget them."""
        found, self._marks = self._marks, {}
        seconds = {name: self._sum(marks) for name, marks in found.items()}
        for marks in found.values():
            self._clock.reuse(marks)
        computing = sum(seconds.get(name, 0.0) for name in COMPUTING)
        return StepTimes(computing, max(0.0, seconds.get(SCHEDULE, 0.0) - computing))

    def _sum(self, marks: list[Any]) -> float:
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return sum(self._clock.seconds(start, end) for start, end in pairs)


class _Part:
    """Timer of one part of the schedule."""

    def __init__(self, timer: ComputeTimer, name: str) -> None:
        self._timer, self._name = timer, name

    def start(self, barrier: bool = False) -> None:
        """Begin the part; ``barrier`` is ignored, since ranks shall not wait for each other."""
        self._timer.begin(self._name)

    def stop(self, barrier: bool = False) -> None:
        """End the part."""
        self._timer.end(self._name)
