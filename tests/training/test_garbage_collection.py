"""Manual garbage collection of a run on two ranks."""

from __future__ import annotations

import gc
import os
import weakref

import pytest

from megatron_llmjp.config.run_config import TrainingConfig
from megatron_llmjp.training.garbage_collection import GarbageCollector
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import Job, arguments


class Cycle:
    """An object that only garbage collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def automatic():
    gc.enable()
    yield
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.enable()


def alive(collector: GarbageCollector, action) -> bool:
    """Whether a cycle survives an action."""
    cycle = Cycle()
    reference = weakref.ref(cycle)
    del cycle
    action(collector)
    return reference() is not None


@pytest.mark.parametrize(
    ("settings", "iterations"),
    [({"manual_gc_interval": 3}, [3, 6]), ({"manual_gc_interval": 0}, [])],
)
def test_iterations(settings, iterations):
    collector = GarbageCollector(TrainingConfig(**settings))
    with collector.disabled():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        freed = [i for i in range(1, 8) if not alive(collector, lambda c: c.after_iteration(i))]  # noqa: B023
    assert freed == iterations


def test_validations_and_rollbacks():
    for is_on in (True, False):
        collector = GarbageCollector(TrainingConfig(manual_gc_eval=is_on))
        with collector.disabled(), pytest.raises(RuntimeError):
            assert alive(collector, lambda c: c.around_validation().__enter__()) != is_on
            model = Cycle()
            raise RuntimeError
    model = Cycle()
    with collector.disabled():
        reference = weakref.ref(model)
        del model
        collector.after_iteration(100)
        assert reference() is not None  # it was frozen
    gc.collect()
    assert reference() is None


def test_without_it_nothing_changes():
    collector = GarbageCollector(TrainingConfig(manual_gc=False, manual_gc_interval=1))
    with collector.disabled():
        assert gc.isenabled() and gc.get_freeze_count() == 0
        gc.disable()
        assert alive(collector, lambda c: c.after_iteration(1))
        gc.enable()


def train_and_count(job: dict, folder: str) -> list[list[object]]:
    """Return the collections during a run: between which steps, and of which generation."""
    from megatron_llmjp.training import trainer
    from tests.support.training import train_on_rank

    found: list[list[object]] = []
    steps = [0]
    step = trainer.train_step

    def counted(*arguments, **options):
        steps[0] += 1
        if int(os.environ["RANK"]) == 1:  # ranks allocate differently
            [Cycle() for _ in range(5000)]
        found.append(["step", steps[0]])
        return step(*arguments, **options)

    def record(phase: str, info: dict) -> None:
        if phase == "start" and steps[0]:
            found.append(["collection", info["generation"]])

    trainer.train_step = counted
    gc.callbacks.append(record)
    train_on_rank([job], folder)
    assert gc.isenabled()
    end = [i for i, (kind, _) in enumerate(found) if kind == "step"][-1]
    return found[: end + 1]


def test_ranks_collect_at_the_same_iterations(tmp_path):
    folds = write_folds(tmp_path, (5,))
    flags = ("--manual-gc-interval", 2, "--eval-interval", 3)
    job = Job("run", (0, 2), tuple(arguments("laptop-llama", folds, *flags)))
    plain = {**vars(job), "flags": [str(flag) for flag in job.flags]}
    found = run_ranks(train_and_count, 2, plain, str(tmp_path))
    every, young = ["collection", 2], ["collection", 0]
    assert found[0] == found[1] == [
        ["step", 1], ["step", 2], every, ["step", 3], every, young, ["step", 4], every,
        ["step", 5],
    ]  # fmt: skip
