"""``--plan-data`` and ``plan_folds``: the table of the run's data, without GPUs or a model.

torch is imported for the learning rate alone, whose curves are megatron-core's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import past, resume
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.plan.data_plan import DataPlan, LearningRate, make_plan
from megatron_llmjp.plan.data_table import show
from megatron_llmjp.plan.data_warnings import find_warnings, warnings_of_data
from megatron_llmjp.prepare_data import (
    RunData,
    count_iterations,
    prepare_data,
    shorten_warmup,
    with_decay,
)
from megatron_llmjp.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Planned:
    """The table and what is to be said of it."""

    plan: DataPlan
    warnings: tuple[str, ...]


def plan_data(config: Config, with_learning_rate: bool = True) -> Planned:
    """Plan the data of a run.

    Args:
        config: the run's; its model and layout are not looked at.
        with_learning_rate: whether to work out learning rates, which takes seconds.

    Raises:
        UserError: the fold file, a dataset or a number of iterations is wrong.
    """
    data = _with_skips(prepare_data(config), config)
    train_iters, _ = count_iterations(config, data.schedule)
    config, _ = shorten_warmup(with_decay(config, data.schedule, train_iters))
    rate = _learning_rate(config, data, train_iters) if with_learning_rate else None
    plan = make_plan(data.schedule, BatchSizes(config), train_iters, rate)
    found = find_warnings(plan, data.schedule, config, data.folds, data.datasets, _made_by(config))
    return Planned(plan, tuple(found))


def data_warnings(config: Config) -> list[str]:
    """What looks wrong in the data of a run; its learning rate is left to the lint."""
    data = _with_skips(prepare_data(config), config)
    train_iters, _ = count_iterations(config, data.schedule)
    sizes, made_by = BatchSizes(config), _made_by(config)
    plan = make_plan(data.schedule, sizes, train_iters, None)
    return warnings_of_data(plan, data.schedule, sizes, data.folds, data.datasets, made_by)


def print_plan(config: Config) -> None:
    """Print the table for ``--plan-data``."""
    planned = plan_data(config)
    print(show(planned.plan, planned.warnings))


def _with_skips(data: RunData, config: Config) -> RunData:
    """With what ``--skip-iterations`` leaves out, now and before the checkpoint to go on from."""
    root, manifest = config.checkpoint.load or config.checkpoint.save, None
    if root and not config.checkpoint.finetune and manifests.complete_iterations(Path(root)):
        found = resume.find(config, {})
        manifest = found.manifest if found else None
    asked, sizes = config.data.skip_iterations, BatchSizes(config)
    schedule, _ = past.skip_iterations(data.schedule, asked, manifest, sizes)
    return replace(data, schedule=schedule)


def _learning_rate(config: Config, data: RunData, train_iters: int) -> LearningRate:
    from megatron_llmjp.training.learning_rate import LearningRates  # imports torch: seconds

    return LearningRates(config, data.schedule, BatchSizes(config), train_iters).at


def _made_by(config: Config) -> Mapping[str, Any] | None:
    """The identity of the run's tokenizer, where one is given."""
    if config.data.tokenizer_type is None:
        return None
    size = config.model.vocab_size - 1 if config.model.vocab_size else None
    kind, model = config.data.tokenizer_type, config.data.tokenizer_model
    return load_tokenizer(kind, model, vocab_size=size).identity()
