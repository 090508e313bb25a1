"""The learning rate and weight decay as functions of the samples trained on.

The curves are megatron-core's ``OptimizerParamScheduler``, which counts samples. One of them spans
the run; a fold with a ``learning_rate`` of its own has another that begins at its first iteration.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.fold_file import FoldLearningRate
from megatron_llmjp.data.folds import Schedule
from megatron_llmjp.errors import UserError
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

Settings = dict[str, Any]
"""Arguments of megatron-core's scheduler."""


@dataclass(frozen=True)
class _Piece:
    """Samples ``[first, end)`` with a curve of their own, whose steps count from ``first``."""

    first: int
    end: int
    curve: OptimizerParamScheduler


class LearningRates:
    """The rate that each iteration applies, whether or not the run is ever started.

    An iteration has the rate of the fold that its first sample is in.

    Args:
        config: the resolved configuration.
        schedule: the resolved folds.
        batch_sizes: which iteration has how many samples.
        train_iters: where the run ends, and a decay without an end of its own.

    Raises:
        UserError: a schedule contradicts itself.
    """

    def __init__(
        self, config: Config, schedule: Schedule, batch_sizes: BatchSizes, train_iters: int
    ) -> None:
        self._config = config
        self._sizes = batch_sizes
        self.settings = _settings_of_run(config, batch_sizes, train_iters)
        """Of the curve that spans the run."""
        _check(self.settings, "the learning rate")
        self._run = _curve(self.settings)
        self._pieces = self._of_folds(schedule)

    def at(self, iteration: int) -> float:
        """The rate that iteration ``iteration`` (from 1) applies."""
        return self.after(self._sizes.consumed_after(iteration - 1))

    def after(self, samples: int) -> float:
        """The rate of the step that follows ``samples`` samples."""
        curve = self._run
        place = bisect.bisect_right(self._pieces, samples, key=lambda piece: piece.first)
        if place > 0 and samples < self._pieces[place - 1].end:
            curve = self._pieces[place - 1].curve
            samples -= self._pieces[place - 1].first
        curve.num_steps = samples
        return float(curve.get_lr({}))

    def _of_folds(self, schedule: Schedule) -> list[_Piece]:
        pieces = []
        for fold in schedule.folds:
            if fold.learning_rate is None:
                continue
            first, end = map(self._first_iteration, schedule.trainable(fold))
            if first < end:
                settings = self._settings_of_fold(fold.learning_rate, first, end)
                _check(settings, f"fold '{fold.name}', learning_rate")
                start = self._sizes.consumed_after(first - 1)
                stop = self._sizes.consumed_after(end - 1)
                pieces.append(_Piece(start, stop, _curve(settings)))
        return pieces

    def _first_iteration(self, sample: int) -> int:
        """The first iteration that begins with trained sample ``sample``, or later."""
        full, rest = self._sizes.iterations(sample)
        return full + (2 if rest else 1)

    def _settings_of_fold(self, own: FoldLearningRate, first: int, end: int) -> Settings:
        """What a fold does not say is the run's, but the decay's length, and no warm-up."""
        before = self._sizes.consumed_after(first - 1)
        decay = self._sizes.consumed_after(first - 1 + (own.lr_decay_iters or end - first)) - before
        warmup = self._sizes.consumed_after(first - 1 + (own.lr_warmup_iters or 0)) - before
        names = {
            "init_lr": own.lr_warmup_init,
            "max_lr": own.lr,
            "min_lr": own.min_lr,
            "lr_decay_style": own.lr_decay_style,
            "lr_wsd_decay_style": own.lr_wsd_decay_style,
            "wsd_decay_steps": own.lr_wsd_decay_iters
            and own.lr_wsd_decay_iters * self._sizes.at(before),
        }
        given = {name: value for name, value in names.items() if value is not None}
        lengths = {"lr_warmup_steps": warmup, "lr_decay_steps": decay}
        return {**self.settings, **lengths, **given}


class RunScheduler(OptimizerParamScheduler):
    """megatron-core's scheduler on an optimizer, with the folds' own learning rates.

    ``num_steps`` counts samples; as in Megatron-LM it stays behind when fp16 skips a step.
    """

    def __init__(self, optimizer: Any, rates: LearningRates) -> None:
        self._rates = rates
        super().__init__(optimizer, **rates.settings)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The rate of the next step, which is the same for all parameters."""
        return self._rates.after(self.num_steps)


def _settings_of_run(config: Config, sizes: BatchSizes, train_iters: int) -> Settings:
    """Lengths in samples, from whichever unit they are given in."""
    o = config.optimizer
    decay = _length(config, o.lr_decay_samples, o.lr_decay_tokens)
    if decay is None:
        part = max(1, round((o.lr_decay_fraction or 1.0) * train_iters))
        decay = sizes.consumed_after(o.lr_decay_iters or part)
    warmup: float | None = _length(config, o.lr_warmup_samples, o.lr_warmup_tokens)
    if o.lr_warmup_fraction is not None:
        warmup = o.lr_warmup_fraction * decay
    tail = _length(config, o.lr_wsd_decay_samples, o.lr_wsd_decay_tokens)
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
        "wd_incr_steps": sizes.consumed_after(train_iters),
        "wd_incr_style": o.weight_decay_incr_style,
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True,
        "wsd_decay_steps": tail,
        "lr_wsd_decay_style": o.lr_wsd_decay_style,
    }


def _length(config: Config, samples: int | None, tokens: int | None) -> int | None:
    if samples is None and tokens is not None:
        return tokens // config.data.seq_length
    return samples


def _curve(settings: Settings) -> OptimizerParamScheduler:
    """megatron-core's scheduler without an optimizer, to be asked for values."""
    return OptimizerParamScheduler(SimpleNamespace(param_groups=[]), **settings)


def _check(settings: Settings, where: str) -> None:
    """Refuse what megatron-core's scheduler would only assert."""
    s = settings
    if s["lr_warmup_steps"] >= s["lr_decay_steps"]:
        raise UserError(
            f"{where}: a warm-up of {s['lr_warmup_steps']} samples leaves nothing of a schedule of "
            f"{s['lr_decay_steps']}: shorten the warm-up"
        )
    for name in ("min_lr", "init_lr"):
        if s[name] > s["max_lr"]:
            label = "lr_warmup_init" if name == "init_lr" else name
            raise UserError(f"{where}: {label} {s[name]} is above lr {s['max_lr']}: lower it")
    if s["lr_decay_style"] == "WSD" and s["wsd_decay_steps"] is None:
        raise UserError(
            f"{where}: lr_decay_style WSD needs lr_wsd_decay_iters, the length of its tail"
        )
    if s["lr_decay_style"] == "WSD" and s["wsd_decay_steps"] > s["lr_decay_steps"]:
        raise UserError(
            f"{where}: the tail of WSD is {s['wsd_decay_steps']} samples long, the whole schedule "
            f"{s['lr_decay_steps']}: shorten the tail"
        )
    if s["end_wd"] < s["start_wd"]:
        raise UserError(
            f"end_weight_decay {s['end_wd']} is below start_weight_decay {s['start_wd']}: "
            "weight decay can only grow"
        )
