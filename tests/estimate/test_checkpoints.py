"""Number and size of checkpoints: estimates compared with those of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp.checkpoint.retention import SaveKind, TrainingPosition, due_save, timed_save
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.estimate.checkpoints import (
    CheckpointCounts,
    checkpoint_bytes,
    count_checkpoints,
    rank_save_bytes,
    save_schedule,
)
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.memory import rank_parameters
from tests.estimate.test_flops import preset
from tests.support.datasets import write_folds
from tests.support.training import Job, arguments, train_all

JOBS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "fp32": ("laptop-llama", ("--save-interval", 2, "--keep-last", 2)),
    "shared": ("laptop-gpt2", ("--use-distributed-optimizer",)),
    "bf16": ("laptop-gpt-neox", ("--bf16", "--no-save-fold-ends")),
    "sgd": ("laptop-gpt2", ("--optimizer", "sgd", "--keep-last", 1)),
    "non-persistent": ("laptop-gpt2", ("--non-persistent-save-interval", 2)),
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
    values = {"non_persistent_save_minutes": 0, **values}
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
    assert count(1000, save_interval_minutes=50) == (11, 11)  # every 99
    assert count(1000, save_interval=100, non_persistent_save_interval=20) == (50, 10)
    # 119 steps of 30 s are the last before an hour: at 119, 238, 357, 476, 500, 619, ...
    assert count(1000, save_interval=500, non_persistent_save_minutes=60) == (10, 2)
    # 83 steps of 43.2 s: 12 times in 1,000 iterations, 9 times in the last 812.
    found = count_checkpoints(preset("llm-jp-3-172b"), 292_812, (), 43.2)
    assert (found.written, found.kept) == (292 * 13 + 10, 293)
    tokens = 10 * preset("laptop-llama").data.seq_length * 20
    assert count(100, save_interval_tokens=tokens) == (5, 5)


RULES: list[dict[str, Any]] = [
    {"save_interval": 30},
    {"save_interval_tokens": 1500},
    {"save_policy": "llm-jp", "save_interval_tokens": 40_000},
    {"save_interval": 48, "non_persistent_save_interval": 20},
    {"save_interval_minutes": 4.2, "save_interval": 25},
    {"non_persistent_save_minutes": 0.9, "save_interval": 25, "save_interval_minutes": 3.0},
    {"non_persistent_save_minutes": 3.0, "save_interval_minutes": 4.0},
    {"save_fold_ends": False, "save_interval": 70},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("ramp", [None, (2, 2, 40)])
def test_schedule_equals_the_rules_of_every_iteration(rules, ramp):
    """The trainer's rules, one iteration after the other; a step takes 10 s."""
    values = {"non_persistent_save_minutes": 0, "rampup_batch_size": ramp, **rules}
    config = replace_fields(preset("laptop-llama"), global_batch_size=8, **values)
    policy, sizes = config.checkpoint.model_copy(update={"save": "x"}), BatchSizeSchedule(config)
    length, ends = config.data.seq_length, (101, 640, 641)
    expected, last, kept, before = {}, 0, 0, TrainingPosition(0, 0)
    for i in range(1, 151):
        now = TrainingPosition(i, sizes.consumed_after(i))
        by_time = timed_save(policy, (i + 1 - last) / 6, (i + 1 - kept) / 6)  # after another step
        kind = max(due_save(policy, before, now, length, ends), by_time)
        kind = SaveKind.PERSISTENT if i == 150 else kind
        if kind:
            expected[i], last = kind, i
            kept = i if kind is SaveKind.PERSISTENT else kept
        before = now
    assert save_schedule(config, 150, ends, 10.0) == expected
