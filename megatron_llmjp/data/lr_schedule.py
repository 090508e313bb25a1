"""Learning-rate schedule settings for megatron-core's scheduler; does not import torch.

All lengths are in samples. One schedule spans the run; a fold with a ``learning_rate`` entry has a
schedule of its own, which starts at the fold's first iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_llmjp.config.learning_rate_rules import ScheduleLengths, learning_rate_problems
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule, planned_samples
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.data.folds.schema import FoldLearningRate
from megatron_llmjp.errors import UserError

SchedulerSettings = dict[str, Any]
"""Arguments of megatron-core's ``OptimizerParamScheduler``."""


@dataclass(frozen=True)
class LearningRateSettings:
    """Settings of all learning-rate schedules of a run."""

    run: SchedulerSettings
    """Of the schedule that spans the run."""
    folds: tuple[tuple[int, int, SchedulerSettings], ...]
    """(First sample, end, settings) of each fold with a schedule of its own."""


def learning_rate_settings(
    config: Config, schedule: Schedule, sizes: BatchSizeSchedule, train_iters: int
) -> LearningRateSettings:
    """Compute and validate the schedule settings of a run.

    Args:
        config: the resolved configuration.
        schedule: the resolved folds.
        sizes: global batch size of each iteration.
        train_iters: last iteration of the run, and of a decay whose length is not given.

    Raises:
        UserError: the settings of a schedule contradict each other.
    """
    run = _settings_of_run(config, sizes, train_iters)
    _check(run, "the learning rate")
    folds = []
    for fold in schedule.folds:
        if fold.learning_rate is None:
            continue
        first, end = (_first_iteration(sizes, at) for at in schedule.sample_range(fold))
        if first < end:
            settings = {**run, **_settings_of_fold(fold.learning_rate, sizes, first, end)}
            _check(settings, f"fold '{fold.name}', learning_rate")
            start, stop = sizes.consumed_after(first - 1), sizes.consumed_after(end - 1)
            folds.append((start, stop, settings))
    return LearningRateSettings(run, tuple(folds))


def _first_iteration(sizes: BatchSizeSchedule, sample: int) -> int:
    """Return the first iteration whose first sample is ``sample`` or a later one."""
    full, rest = sizes.iterations(sample)
    return full + (2 if rest else 1)


def _settings_of_fold(
    own: FoldLearningRate, sizes: BatchSizeSchedule, first: int, end: int
) -> SchedulerSettings:
    """Return the settings that differ from the run's; by default no warm-up, decay to the end."""
    before = sizes.consumed_after(first - 1)
    decay = sizes.consumed_after(first - 1 + (own.lr_decay_iters or end - first)) - before
    warmup = sizes.consumed_after(first - 1 + (own.lr_warmup_iters or 0)) - before
    names = {
        "init_lr": own.lr_warmup_init,
        "max_lr": own.lr,
        "min_lr": own.min_lr,
        "lr_decay_style": own.lr_decay_style,
        "lr_wsd_decay_style": own.lr_wsd_decay_style,
        "wsd_decay_steps": own.lr_wsd_decay_iters and own.lr_wsd_decay_iters * sizes.at(before),
    }
    given = {name: value for name, value in names.items() if value is not None}
    return {"lr_warmup_steps": warmup, "lr_decay_steps": decay, **given}


def _settings_of_run(
    config: Config, sizes: BatchSizeSchedule, train_iters: int
) -> SchedulerSettings:
    """Return the settings of the run's schedule, with all lengths converted to samples."""
    o = config.optimizer
    decay = in_samples(config, o.lr_decay_samples, o.lr_decay_tokens)
    if decay is None:
        part = max(1, round((o.lr_decay_fraction or 1.0) * train_iters))
        decay = sizes.consumed_after(o.lr_decay_iters or part)
    warmup: float | None = in_samples(config, o.lr_warmup_samples, o.lr_warmup_tokens)
    if o.lr_warmup_fraction is not None:
        warmup = o.lr_warmup_fraction * decay
    tail = in_samples(config, o.lr_wsd_decay_samples, o.lr_wsd_decay_tokens)
    if o.lr_wsd_decay_fraction is not None:
        tail = round(o.lr_wsd_decay_fraction * decay)
    if tail is None and o.lr_wsd_decay_iters is not None:
        tail = o.lr_wsd_decay_iters * config.training.global_batch_size
    constant = o.weight_decay_incr_style == "constant"
    start, end = o.start_weight_decay, o.end_weight_decay
    return {
        "init_lr": o.lr_warmup_init,
        "max_lr": o.lr,
        "min_lr": o.min_lr,
        "lr_warmup_steps": sizes.consumed_after(o.lr_warmup_iters) if warmup is None else warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": o.lr_decay_style,
        "start_wd": o.weight_decay if constant or start is None else start,
        "end_wd": o.weight_decay if constant or end is None else end,
        "wd_incr_steps": planned_samples(config, sizes) or sizes.consumed_after(train_iters),
        "wd_incr_style": o.weight_decay_incr_style,
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True,
        "wsd_decay_steps": tail,
        "lr_wsd_decay_style": o.lr_wsd_decay_style,
    }


def in_samples(config: Config, samples: int | None, tokens: int | None) -> int | None:
    """Convert a length given in samples or tokens to samples; None if neither is given."""
    if samples is None and tokens is not None:
        return tokens // config.data.seq_length
    return samples


def length_in_iterations(config: Config, name: str) -> int | None:
    """Return ``lr_decay`` or ``lr_warmup`` in iterations, in whichever unit it is given."""
    o = config.optimizer
    samples = in_samples(config, getattr(o, f"{name}_samples"), getattr(o, f"{name}_tokens"))
    if samples is not None:
        return BatchSizeSchedule(config).iterations(samples)[0]
    iterations: int | None = getattr(o, f"{name}_iters")
    return iterations


def _check(settings: SchedulerSettings, where: str) -> None:
    """Raise UserError for a schedule that breaks the rules."""
    s = settings
    problems = learning_rate_problems(
        s["max_lr"],
        s["min_lr"],
        s["init_lr"],
        s["lr_decay_style"],
        ScheduleLengths("samples", s["lr_warmup_steps"], s["lr_decay_steps"], s["wsd_decay_steps"]),
        has_wsd_decay=s["wsd_decay_steps"] is not None,
    )
    if lines := [f"{where}: {problem}" for problem in problems]:
        raise UserError("\n".join(lines))
