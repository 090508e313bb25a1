"""Save and retention policies."""

from __future__ import annotations

import pytest

from megatron_llmjp.checkpoint.retention import (
    TrainingPosition,
    reason_to_save,
    removable_iterations,
)
from megatron_llmjp.config.schema import CheckpointConfig

BATCH, SEQ_LENGTH = 4, 32


def saves(iterations: int, fold_ends: tuple[int, ...] = (), **fields) -> list[int]:
    """Return the iterations after which a run saves; an iteration takes a minute."""
    config = CheckpointConfig(save="folder", **fields)
    found, last = [], 0
    for i in range(1, iterations + 1):
        before, now = TrainingPosition(i - 1, (i - 1) * BATCH), TrainingPosition(i, i * BATCH)
        if reason_to_save(config, before, now, SEQ_LENGTH, fold_ends, minutes=i - last):
            found.append(i)
            last = i
    return found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"save_interval": 4}, [4, 8, 12]),
        # 128 tokens per iteration: multiples of 300 are reached in iterations 3, 5, 8, 10 and 12.
        ({"save_interval_tokens": 300}, [3, 5, 8, 10, 12]),
        ({"save_interval_tokens": 1}, list(range(1, 13))),
        ({"save_interval_minutes": 5}, [5, 10]),
        ({"save_interval_minutes": 2.5}, [3, 6, 9, 12]),
        ({"save_interval_minutes": 5, "save_interval": 4}, [4, 8, 12]),
        ({"save_policy": "llm-jp"}, [*range(1, 11)]),
    ],
)
def test_when_to_save(fields, expected):
    assert saves(12, **fields) == expected


def test_pattern_of_llm_jp():
    """1..9, 10..90 by 10, 100..900 by 100, then every 1000."""
    expected = [*range(1, 10), *range(10, 100, 10), *range(100, 1000, 100), 1000, 2000, 3000]
    assert saves(3999, save_policy="llm-jp") == expected


def test_fold_ends():
    # A fold of 10 samples ends inside iteration 3; its last samples are from the next fold.
    assert saves(6, fold_ends=(10, 20)) == [3, 5]
    assert saves(6, fold_ends=(10, 20), save_fold_ends=False) == []
    # Two folds that end in one iteration cause one save.
    assert saves(6, fold_ends=(9, 10)) == [3]


def test_nothing_is_saved_without_a_folder():
    config = CheckpointConfig(save_interval=1)
    assert (
        reason_to_save(config, TrainingPosition(0, 0), TrainingPosition(1, 4), SEQ_LENGTH) is None
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"keep_last": 1}, [10, 20, 30, 40]),
        ({"keep_last": 3}, [10, 20]),
        ({"keep_last": 7}, []),
        ({"keep_last": 9}, []),
        ({"keep_last": 1, "keep_every": 20}, [10, 30]),
        ({"keep_last": 2, "save_fold_ends": True}, [20, 30]),
        ({"keep_last": 1, "keep_every": 30, "save_fold_ends": True}, [20, 40]),
    ],
)
def test_removed_iterations(fields, expected):
    config = CheckpointConfig(save="folder", **{"save_fold_ends": False, **fields})
    # 60 is newer than the checkpoint just saved: it may belong to another run.
    assert removable_iterations([50, 10, 30, 20, 40, 60], 50, config, fold_ends={10}) == expected
    assert 50 not in removable_iterations([50], 50, config, fold_ends=())
