"""Which sample indices are built when: before the run, by the background process, or at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_llmjp.data.indices import prefetch
from megatron_llmjp.data.indices.index_cache import find_damage
from megatron_llmjp.data.indices.prefetch import MAX_INLINE_COST, IndexPrefetcher

SAMPLES = 10
"""Of each fold."""


class Index:
    def __init__(self, folder: Path, cost: int = 1) -> None:
        self.folder, self.build_cost = folder, cost

    def build(self, temporary: Path) -> None:
        (temporary / "file").write_text("content")

    @property
    def exists(self) -> bool:
        return find_damage(self.folder) is None


class Background:
    """Replacement for the background process."""

    def __init__(self, indices) -> None:
        self.indices, self.code, self.killed = list(indices), None, False

    def poll(self):
        return self.code

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> None:
        assert self.killed


class Folds:
    """Folds a, b, ... of ten samples and two indices each."""

    def __init__(self, folder: Path, costs: list[int]) -> None:
        folds = [SimpleNamespace(name="abcdef"[number]) for number in range(len(costs))]
        self.all = {
            fold.name: [Index(folder / f"{fold.name}{i}", cost) for i in range(2)]
            for fold, cost in zip(folds, costs, strict=True)
        }
        self.schedule = SimpleNamespace(
            folds=tuple(folds),
            fold_of_sample=lambda sample: folds[min(sample // SAMPLES, len(folds) - 1)],
        )

    def indices(self, fold) -> list[Index]:
        return self.all[fold.name]

    def existing(self) -> str:
        found = [name for name, indices in self.all.items() if all(i.exists for i in indices)]
        return "".join(found)


@pytest.fixture
def started(monkeypatch):
    """The background processes that were started."""
    found: list[Background] = []

    def start(indices) -> Background:
        found.append(Background(indices))
        return found[-1]

    monkeypatch.setattr(prefetch, "build_in_background", start)
    return found


HALF = MAX_INLINE_COST // 2


@pytest.mark.parametrize(
    ("costs", "first", "batch", "built", "logged", "following"),
    [
        # Small folds that follow are built too, up to the limit.
        ([1, HALF // 2, HALF // 2, 1], 0, 4, "abc", ["building 7 sample indices for a"], "d"),
        ([1, HALF // 2, HALF // 2 + 1, 1], 0, 4, "ab", [], "c"),
        ([1, HALF + 1, 1], 0, 4, "a", [], "b"),
        # A batch of two folds needs both; a batch that ends with a fold does not need the next.
        ([1, HALF + 1, 1], 6, 4, "a", [], "b"),
        ([1, HALF + 1, HALF + 1], 7, 4, "ab", ["building 5 sample indices for a, b"], "c"),
        ([HALF, HALF + 1, HALF + 1], 0, 4, "a", [], "b"),
        ([HALF + 1, HALF + 1], 0, 4, "a", ["building 3 sample indices for a"], "b"),
        ([1, 1], 10, 4, "b", [], ""),
    ],
)
def test_before_the_run(tmp_path, started, costs, first, batch, built, logged, following):
    data, log, beats = Folds(tmp_path, costs), [], []
    held_out = Index(tmp_path / "held", 0)
    index = IndexPrefetcher(
        data, first_on_machine=True, log=log.append, heartbeat=lambda: beats.append(1)
    )
    index.start(first, batch, [held_out])
    assert data.existing() == built and held_out.exists
    assert log == logged
    assert len(beats) == 2 * len(built) + 1
    assert [process.indices for process in started] == [data.all[name] for name in following]
    index.close()
    assert all(process.killed for process in started)


def test_existing_indices_cost_nothing(tmp_path, started):
    data, log = Folds(tmp_path, [HALF + 1, HALF + 1, HALF + 1]), []
    for name in "ab":
        for index in data.all[name]:
            index.folder.mkdir()
            prefetch.ensure_indices([Index(index.folder)])
    index = IndexPrefetcher(data, first_on_machine=True, log=log.append)
    index.start(0, 4, [])
    assert log == [] and data.existing() == "ab"
    assert [process.indices for process in started] == [data.all["c"]]


def test_other_ranks_of_a_machine_start_no_process(tmp_path, started):
    data = Folds(tmp_path, [1, HALF + 1])
    index = IndexPrefetcher(data, first_on_machine=False, log=lambda _: None)
    index.start(0, 4, [])
    assert started == [] and data.existing() == "a"
    index.close()


def test_at_the_start_of_a_fold(tmp_path, started):
    """Every rank waits for the process, of which there is one, and starts that of the next."""
    data, log = Folds(tmp_path, [HALF + 1] * 4), []
    index = IndexPrefetcher(data, first_on_machine=True, log=log.append)
    index.start(0, 4, [])
    (process,) = started
    assert index.ensure_ready(6, 4)  # the last batch of the first fold
    log.clear()

    waits = []

    def wait(ready) -> bool:
        waits.append([ready(), ready()])
        prefetch.ensure_indices(data.all["b"][:1])
        waits.append(ready())  # one index of two
        prefetch.ensure_indices(data.all["b"])
        waits.append(ready())
        return True

    assert index.ensure_ready(7, 4, wait)
    assert waits == [[False, False], False, True]
    assert log == ["waiting for the sample indices of fold 'b'"]
    assert len(started) == 2 and process.killed
    assert started[1].indices == data.all["c"]
    assert index.ensure_ready(8, 4, wait) and len(waits) == 3  # it has begun

    assert not index.ensure_ready(18, 4, lambda ready: False)  # it gave up
    assert index.ensure_ready(18, 4, lambda ready: prefetch.ensure_indices(data.all["c"]) or True)
    assert started[-1].indices == data.all["d"]


def test_a_process_that_failed_is_replaced_by_this_one(tmp_path, started):
    data = Folds(tmp_path, [HALF + 1] * 2)
    index = IndexPrefetcher(data, first_on_machine=True, log=lambda _: None)
    index.start(0, 4, [])
    started[0].code = 1
    assert index.ensure_ready(10, 4, lambda ready: ready())
    assert data.existing() == "ab"


@pytest.mark.parametrize(("seconds", "built"), [(600.0, "a"), (600.1, "ab")])
def test_other_ranks_wait_for_a_limited_time(tmp_path, started, monkeypatch, seconds, built):
    """In case the first rank of the machine cannot build."""
    data, now = Folds(tmp_path, [HALF + 1] * 2), [1000.0]
    index = IndexPrefetcher(data, first_on_machine=False, log=lambda _: None)
    index.start(0, 4, [])
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: now[0])

    def wait(ready) -> bool:
        assert not ready()
        now[0] += seconds
        return ready()

    assert index.ensure_ready(10, 4, wait) == (built == "ab")
    assert data.existing() == built


def test_waiting_alone(monkeypatch):
    pauses, answers = [], [False, False, True]
    monkeypatch.setattr(prefetch.time, "sleep", pauses.append)
    assert prefetch.wait_alone(lambda: answers.pop(0))
    assert pauses == [0.2, 0.2] and answers == []
