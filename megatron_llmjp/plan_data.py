"""``--plan-data`` and ``plan_folds``: the table of the run's data, without GPUs or a model.

torch is imported for the learning rate alone, whose curves are megatron-core's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import past, resume
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.dataset_tokenizers import several_makers
from megatron_llmjp.plan.data_plan import DataPlan, LearningRate, make_plan
from megatron_llmjp.plan.data_table import show
from megatron_llmjp.plan.data_warnings import find_warnings
from megatron_llmjp.plan.overlap import overlaps
from megatron_llmjp.prepare_data import (
    RunData,
    check_tokenizer,
    count_iterations,
    prepare_data,
    run_tokenizer,
    shorten_warmup,
    with_decay,
)


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
        UserError: the fold file, a dataset or a number of iterations is wrong, or a dataset was
            made with another tokenizer than the run's.
    """
    data = prepare_data(config)
    makers = _makers(config, data)
    data = _with_skips(data, config)
    train_iters, _ = count_iterations(config, data.schedule)
    config, _ = shorten_warmup(with_decay(config, data.schedule, train_iters))
    rate = _learning_rate(config, data, train_iters) if with_learning_rate else None
    plan = make_plan(data.schedule, BatchSizes(config), train_iters, rate)
    found = find_warnings(plan, data.schedule, config, data.folds, data.datasets)
    return Planned(plan, (*makers, *found, *overlaps(data.folds)))


def print_plan(config: Config) -> None:
    """Print the table for ``--plan-data``."""
    planned = plan_data(config)
    print(show(planned.plan, planned.warnings))


def _makers(config: Config, data: RunData) -> list[str]:
    """Warnings on the tokenizers that made the datasets; a run may name none here."""
    tokenizer = run_tokenizer(config)
    if tokenizer is None:
        return several_makers(data.datasets)
    return check_tokenizer(config, data.datasets, tokenizer)


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
