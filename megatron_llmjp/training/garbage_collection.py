"""Garbage collection at the same iterations on all ranks.

Python collects garbage whenever enough objects were created, which takes tens of milliseconds in a
process with millions of objects. Ranks do so in different iterations, and all others wait for each
of them. During training the automatic collection is therefore disabled, as by Megatron-LM's
``--manual-gc``, and objects that existed before are excluded (``gc.freeze``).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_llmjp.config.schema import TrainingConfig


class GarbageCollector:
    """Collects garbage every ``manual_gc_interval`` iterations, and around validations.

    Does nothing unless ``manual_gc`` is set. All ranks call its methods at the same iterations.
    megatron-core collects at each save of a distributed optimizer.

    Args:
        config: the settings.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the automatic collection; entered once model and optimizer exist."""
        if not self._config.manual_gc:
            yield
            return
        was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()  # a rollback must be able to free the model
            if was_enabled:
                gc.enable()

    def after_iteration(self, iteration: int) -> None:
        """Collect if the interval is due."""
        interval = self._config.manual_gc_interval
        if interval and iteration % interval == 0:
            self._collect()

    @contextmanager
    def around_validation(self) -> Iterator[None]:
        """Collect before a validation, and its own young objects after it (``manual_gc_eval``)."""
        if self._config.manual_gc_eval:
            self._collect()
        yield
        if self._config.manual_gc_eval:
            self._collect(generation=0)

    def _collect(self, generation: int = 2) -> None:
        if self._config.manual_gc:
            gc.collect(generation)
