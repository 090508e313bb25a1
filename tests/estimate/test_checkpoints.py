"""Number and size of checkpoints: estimates compared with those of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp.checkpoint.retention import TrainingPosition, reason_to_save
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.memory import (
    CheckpointCounts,
    checkpoint_bytes,
    count_checkpoints,
    rank_parameters,
    rank_save_bytes,
)
from tests.estimate.test_flops import preset
from tests.support.datasets import write_folds
from tests.support.training import Job, arguments, train_all

JOBS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "fp32": ("laptop-llama", ("--save-interval", 2, "--keep-last", 2)),
    "shared": ("laptop-gpt2", ("--use-distributed-optimizer",)),
    "bf16": ("laptop-gpt-neox", ("--bf16", "--no-save-fold-ends")),
    "sgd": ("laptop-gpt2", ("--optimizer", "sgd", "--keep-last", 1)),
}
ON_TWO_RANKS = {
    "dp2": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    "dp2-bf16": ("--bf16",),  # every rank holds the whole optimizer state
    "tp2": ("--tensor-model-parallel-size", 2),
}
"""Flags of runs of laptop-llama, whose ranks share the work of a save."""
FOLD_ENDS = (12, 20)
"""Samples after 3 and 5 iterations of 4."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    folds = write_folds(folder, (3, 2))
    jobs = [Job(name, (0, 1), tuple(words(name, folds))) for name in JOBS]
    jobs += [Job(name, (0, 2), tuple(words_of_two(name, folds))) for name in ON_TWO_RANKS]
    train_all(jobs, 2, folder)
    return folder, folds


def words(name: str, folds: Path) -> list[str]:
    style, flags = JOBS[name]
    return arguments(style, folds, *flags, hidden_size=256, ffn_hidden_size=512, eval_iters=0)


@pytest.mark.parametrize("name", JOBS)
def test_estimate_matches_real_run(saved, name):
    folder, folds = saved
    config = replace_fields(parse(words(name, folds))[0], vocab_size=100)
    kept = sorted((folder / name).glob("iter_*"))
    found = count_checkpoints(config, 5, FOLD_ENDS, step_seconds=1.0)
    assert found.kept == len(kept)
    size = sum(file.stat().st_size for file in kept[-1].rglob("*") if file.is_file())
    assert checkpoint_bytes(config) == pytest.approx(size, rel=0.03)


def words_of_two(name: str, folds: Path) -> list[str]:
    flags = ("--train-iters", 1, "--lr-warmup-iters", 0, "--eval-iters", 0, *ON_TWO_RANKS[name])
    return arguments("laptop-llama", folds, *flags, hidden_size=256, ffn_hidden_size=512)


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_each_rank_writes_its_part(saved, name):
    folder, folds = saved
    config = replace_fields(parse(words_of_two(name, folds))[0], vocab_size=100)
    layout = make_layout(config, 2)
    expected = rank_save_bytes(config, layout, rank_parameters(config, layout, layout.stages[0]))
    (checkpoint,) = (folder / name).glob("iter_*")
    for rank in range(2):
        size = sum(file.stat().st_size for file in checkpoint.glob(f"__{rank}_*.distcp"))
        assert expected == pytest.approx(size, rel=0.1), rank


def count(iterations: int, *fold_ends: int, **values: Any) -> tuple[int, int]:
    found = count_checkpoints(
        replace_fields(preset("laptop-llama"), global_batch_size=10, **values),
        iterations,
        fold_ends,
        30.0,
    )
    assert isinstance(found, CheckpointCounts)
    return found.written, found.kept


def test_counts():
    assert count(1000) == (1, 1)
    assert count(1000, save_interval=100) == (10, 10)
    assert count(1050, save_interval=100) == (11, 11)
    assert count(1050, save_interval=100, keep_last=3) == (11, 3)
    assert count(1050, save_interval=100, keep_last=3, keep_every=500) == (11, 4)
    assert count(1050, 5000, 10500, save_interval=200, keep_last=1) == (7, 2)
    assert count(5000, save_policy="llm-jp") == (9 + 9 + 9 + 5, 9 + 9 + 9 + 5)
    assert count(1000, save_interval_minutes=50) == (10, 10)
    assert count(100, save_interval_tokens=10 * preset("laptop-llama").data.seq_length * 20) == (
        5,
        5,
    )


@pytest.mark.parametrize(
    "policy",
    [
        {"save_interval": 7},
        {"save_interval": 7, "save_interval_minutes": 2.6},
        {"save_policy": "llm-jp", "save_interval_tokens": 777},
        {"save_interval_tokens": 1, "save_fold_ends": False},
        {"save_interval_minutes": 0.1},
    ],
)
def test_counts_are_those_of_the_trainer_asked_after_each_iteration(policy):
    values = {"seq_length": 16, "global_batch_size": 10, "rampup_batch_size": (4, 2, 300)}
    config = replace_fields(preset("laptop-llama"), save="x", **values, **policy)
    iterations, fold_ends, sizes = 333, (4, 999, 2001, 90_000), BatchSizeSchedule(config)
    saved, before = [0], TrainingPosition(0, 0)
    for iteration in range(1, iterations + 1):
        now = TrainingPosition(iteration, sizes.consumed_after(iteration))
        minutes = (iteration - saved[-1]) * 30.0 / 60
        if reason_to_save(config.checkpoint, before, now, 16, fold_ends, minutes):
            saved.append(iteration)
        before = now
    expected = len({*saved[1:], iterations})
    found = count_checkpoints(config, iterations, fold_ends, step_seconds=30.0)
    assert found == CheckpointCounts(expected, expected)
