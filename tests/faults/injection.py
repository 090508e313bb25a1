"""Injection of faults into a rank at a phase of the trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def inject_at(phase: str, iteration: int, action: Callable[[Any], None]) -> None:
    """Run an action when the trainer begins a phase, such as "a step", at an iteration."""
    from megatron_llmjp.training.trainer import Trainer

    begin = Trainer._begin

    def wrapped(self: Any, begun: str, *rest: Any, **named: Any) -> None:
        begin(self, begun, *rest, **named)
        if begun == phase and self.iteration == iteration:
            action(self)

    Trainer._begin = wrapped  # type: ignore[method-assign]
