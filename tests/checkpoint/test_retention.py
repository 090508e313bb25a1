"""Save and retention policies."""

from __future__ import annotations

import pytest

from megatron_llmjp.checkpoint.retention import (
    SaveKind,
    TrainingPosition,
    due_save,
    removable_iterations,
    timed_save,
)
from megatron_llmjp.config.schema import CheckpointConfig

BATCH, SEQ_LENGTH = 4, 32


def saves(iterations: int, fold_ends: tuple[int, ...] = (), **fields) -> dict[int, str]:
    """Return the kind of save by iteration; an iteration takes a minute.

    Time is measured as on one rank: before an iteration, as another one would be too late.
    """
    config = CheckpointConfig(save="folder", **{"non_persistent_save_minutes": 0, **fields})
    found, last, kept = {}, 0, 0
    for i in range(1, iterations + 1):
        before, now = TrainingPosition(i - 1, (i - 1) * BATCH), TrainingPosition(i, i * BATCH)
        by_length = due_save(config, before, now, SEQ_LENGTH, fold_ends)
        kind = max(by_length, timed_save(config, i + 1 - last, i + 1 - kept))
        if kind:
            found[i] = {1: "non-persistent", 2: "persistent"}[kind]
            last = i
            kept = i if kind is SaveKind.PERSISTENT else kept
    return found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"save_interval": 4}, [4, 8, 12]),
        # 128 tokens per iteration: multiples of 300 are reached in iterations 3, 5, 8, 10 and 12.
        ({"save_interval_tokens": 300}, [3, 5, 8, 10, 12]),
        ({"save_interval_tokens": 1}, list(range(1, 13))),
        ({"save_interval_minutes": 5}, [4, 8, 12]),
        ({"save_interval_minutes": 4.5}, [4, 8, 12]),
        ({"save_interval_minutes": 6, "save_interval": 4}, [4, 8, 12]),
        ({"save_policy": "llm-jp"}, [*range(1, 11)]),
    ],
)
def test_when_to_save(fields, expected):
    assert saves(12, **fields) == dict.fromkeys(expected, "persistent")


def test_non_persistent_saves():
    """At the latest an hour after the last save of any kind, by default."""
    n, p = "non-persistent", "persistent"
    assert saves(200, non_persistent_save_minutes=60) == {59: n, 118: n, 177: n}
    assert CheckpointConfig().non_persistent_save_minutes == 60
    hourly = saves(200, non_persistent_save_minutes=60, save_interval=100)
    assert hourly == {59: n, 100: p, 159: n, 200: p}
    assert saves(9, non_persistent_save_interval=2, save_interval=4) == {2: n, 4: p, 6: n, 8: p}
    both = {"non_persistent_save_minutes": 5, "save_interval_minutes": 5}
    assert saves(8, **both) == {4: p, 8: p}
    rarer = {"non_persistent_save_minutes": 3, "save_interval_minutes": 6}
    assert saves(10, **rarer) == {2: n, 4: n, 5: p, 7: n, 9: n, 10: p}


def test_pattern_of_llm_jp():
    """1..9, 10..90 by 10, 100..900 by 100, then every 1000."""
    expected = [*range(1, 10), *range(10, 100, 10), *range(100, 1000, 100), 1000, 2000, 3000]
    assert list(saves(3999, save_policy="llm-jp")) == expected


def test_fold_ends():
    # A fold of 10 samples ends inside iteration 3; its last samples are from the next fold.
    assert list(saves(6, fold_ends=(10, 20))) == [3, 5]
    assert saves(6, fold_ends=(10, 20), save_fold_ends=False) == {}
    # Two folds that end in one iteration cause one save.
    assert list(saves(6, fold_ends=(9, 10))) == [3]


def test_nothing_is_saved_without_a_folder():
    config = CheckpointConfig(save_interval=1, save_interval_minutes=1)
    positions = TrainingPosition(0, 0), TrainingPosition(1, 4)
    assert due_save(config, *positions, SEQ_LENGTH) is SaveKind.NONE
    assert timed_save(config, 9.0, 9.0) is SaveKind.NONE


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


@pytest.mark.parametrize(
    ("fields", "newest", "expected"),
    [
        ({}, 50, [20, 40]),
        ({"keep_last": 1}, 50, [10, 20, 30, 40]),
        ({"keep_last": 2}, 50, [10, 20, 40]),
        # A non-persistent one as the newest does not count.
        ({"keep_last": 1}, 40, [10, 20]),
        ({"keep_last": 2}, 40, [20]),
        ({"keep_last": 1, "keep_every": 10}, 50, [20, 40]),
    ],
)
def test_removed_non_persistent_ones(fields, newest, expected):
    config = CheckpointConfig(save="folder", **fields)
    saved = [10, 20, 30, 40, 50]
    assert removable_iterations(saved, newest, config, (), {20, 40}) == expected
