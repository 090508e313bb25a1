"""Rules and warnings on learning-rate schedules: those of a run and those of single folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_llmjp.config.lr_decay_styles import DECAY_STYLES
from megatron_llmjp.config.run_config import OptimizerConfig


@dataclass(frozen=True)
class ScheduleLengths:
    """Lengths of one learning-rate schedule, all in the same unit."""

    unit: str
    """``iters`` or ``samples``, for messages."""
    warmup: float
    decay: float | None
    """Warm-up and decay together; None when not known yet."""
    wsd_decay: float | None
    """The final decay of WSD; None when not given in this unit."""
    decay_name: str = ""
    """The field that sets ``decay``; ``lr_decay_UNIT`` when empty."""


def learning_rate_problems(
    lr: float,
    min_lr: float,
    lr_warmup_init: float,
    lr_decay_style: str,
    lengths: ScheduleLengths,
    has_wsd_decay: bool,
) -> Iterator[str]:
    """Yield one line for each rule that a schedule breaks; megatron-core would only assert them.

    Args:
        lr: peak learning rate.
        min_lr: learning rate at the end of the decay.
        lr_warmup_init: learning rate at the start of the warm-up.
        lr_decay_style: shape of the decay.
        lengths: lengths of its parts.
        has_wsd_decay: whether the length of the final decay is given, in whichever unit.
    """
    for name, value in (("min_lr", min_lr), ("lr_warmup_init", lr_warmup_init)):
        if value > lr:
            yield f"{name} {value} is above lr {lr}: lower {name}"
    decay, unit = lengths.decay, lengths.unit
    decay_name = lengths.decay_name or f"lr_decay_{unit}"
    if decay is not None and lengths.warmup >= decay:
        yield (
            f"lr_warmup_{unit} {lengths.warmup} must be smaller than {decay_name} {decay}: shorten "
            "the warm-up"
        )
    if not DECAY_STYLES[lr_decay_style].has_final_decay:
        return
    if not has_wsd_decay:
        yield (
            f"lr_decay_style {lr_decay_style} needs lr_wsd_decay_iters, the length of the final "
            "decay"
        )
    if decay is not None and lengths.wsd_decay is not None and lengths.wsd_decay > decay:
        yield (
            f"lr_wsd_decay_{unit} {lengths.wsd_decay} is longer than {decay_name} {decay}, which "
            f"includes it: shorten lr_wsd_decay_{unit}"
        )


def decay_warnings(
    optimizer: OptimizerConfig,
    decay_end: int | None,
    train_iters: int,
    fold_iterations: Sequence[range] = (),
) -> Iterator[str]:
    """Yield a warning when the learning-rate decay does not end with the run.

    Args:
        optimizer: the run's.
        decay_end: last iteration of the decay; None when not known.
        train_iters: last iteration of the run.
        fold_iterations: iterations of folds that have a learning-rate schedule of their own.
    """
    style = DECAY_STYLES[optimizer.lr_decay_style]
    if decay_end is None or not style.decays:
        return
    end = train_iters + 1
    own = sum(len(range(max(r.start, decay_end + 1), min(r.stop, end))) for r in fold_iterations)
    rest = train_iters - decay_end - own
    if rest > 0:
        yield (
            f"the learning-rate decay ends at iteration {decay_end:,}, the run at {train_iters:,}: "
            f"{rest:,} iterations are trained at min_lr {optimizer.min_lr:g}. The scripts of "
            "llm-jp-3 did so (they added the warm-up to the decay, which already includes it); "
            f"lr_decay_iters {train_iters} decays until the end of the run"
        )
    elif (
        decay_end > train_iters
        and not style.has_final_decay
        and not any(train_iters in iterations for iterations in fold_iterations)
    ):
        yield (
            f"the learning-rate decay ends at iteration {decay_end:,}, after the run's last "
            f"iteration {train_iters:,}: min_lr {optimizer.min_lr:g} is not reached. This is right "
            f"if the run will be extended; otherwise set lr_decay_iters {train_iters}"
        )
