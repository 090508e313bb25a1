"""What a person reads in the log, in Megatron-LM's words and order where it has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

from megatron_llmjp.numbers import duration, human


def interval_line(
    iteration: int, train_iters: int, consumed: int, values: Mapping[str, float], fold: str
) -> str:
    """One interval in one line; values that are not known are omitted.

    So is the loss of an interval in which no step had one, as in Megatron-LM's log.
    """
    parts = [
        f"iteration {iteration:8d}/{train_iters:8d}",
        f"consumed samples: {consumed:12d}",
        f"consumed tokens: {human(values['consumed tokens'])}",
        f"elapsed time per iteration (ms): {values['seconds per iteration'] * 1000:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {values['TFLOP/s per GPU']:.1f}",
        _if_known("MFU: {:.1%}", values.get("MFU")),
        f"tokens/s: {human(values['tokens per second'])}",
        f"learning rate: {values['learning rate']:.6E}",
        f"global batch size: {values['global batch size']:5d}",
        _if_known("lm loss: {:.6E}", values["lm loss"]),
        _if_known("z loss: {:.6E}", values.get("z loss")),
        f"loss scale: {values['loss scale']:.1f}",
        f"grad norm: {values['grad norm']:.3f}",
        _if_known("params norm: {:.3f}", values.get("params norm")),
        f"number of skipped iterations: {values['skipped iterations']:3d}",
        f"number of nan iterations: {values['nan iterations']:3d}",
        _if_not_zero("number of spikes: {:3d}", values.get("spikes")),
        _if_not_zero("number of rollbacks: {:3d}", values.get("rollbacks")),
        f"fold: {fold}",
        f"remaining: {duration(values['seconds remaining'])}",
    ]
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    return f" [{now}] {' | '.join(part for part in parts if part)} |"


def _if_known(form: str, value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def _if_not_zero(form: str, value: float | None) -> str:
    return form.format(value) if value else ""
