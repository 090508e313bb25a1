"""Phases of a run, which hang reports name and whose CPU time may count as progress."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from megatron_llmjp.errors import EXIT_DONE
from megatron_llmjp.training import train, trainer


class Phases:
    """A watchdog that only knows the current phase."""

    now = (0, "start", False)

    def begin(self, iteration, phase, counts_work=False) -> None:
        self.now = (iteration, phase, counts_work)

    def beat(self) -> None:
        pass


def test_phases_of_eval_only(monkeypatch):
    """Library calls that give no heartbeat count their work; a validation gives one per batch."""
    watchdog, during = Phases(), {}

    def stand_in(module, name, result=None) -> None:
        def call(*_, **__):
            during[name] = watchdog.now
            return result

        monkeypatch.setattr(module, name, call)

    stand_in(train.run_setup, "open_validation_sets")
    stand_in(train.rendezvous, "all_gather_from_store")
    stand_in(train.process_groups, "initialize")
    stand_in(train, "new_group_without_timeout")
    stand_in(train.run_setup, "load_weights")
    stand_in(train.run_setup, "print_run_summary")
    stand_in(train, "evaluate", {"held": 2.5})
    stand_in(train, "print_rank_0")
    stand_in(train.process_groups, "destroy")
    run = SimpleNamespace(
        resume=SimpleNamespace(manifest=SimpleNamespace(iteration=7, consumed_samples=28)),
        config=SimpleNamespace(
            training=SimpleNamespace(eval_only=True),
            checkpoint=SimpleNamespace(finetune=False),
            logging=SimpleNamespace(log_format=None),
        ),
        train_iters=10,
    )
    context = train._RankContext(SimpleNamespace(), SimpleNamespace(), None, watchdog, [], "")
    assert train._validate_only(run, context) == EXIT_DONE
    joining = (7, "joining the process groups", True)
    assert list(during.items())[:-2] == [
        ("open_validation_sets", (0, "building sample indices", True)),
        ("all_gather_from_store", joining),
        ("initialize", joining),
        ("new_group_without_timeout", joining),
        ("load_weights", (7, "loading the model", True)),
        ("print_run_summary", (7, "loading the model", True)),
        ("evaluate", (7, "a validation", False)),
    ]


def test_a_validation_gives_heartbeats(monkeypatch):
    """One per batch; else a long validation is reported as a hang."""
    beats, logged = [], []

    def evaluate(*_, should_stop, beat):
        for _ in range(3):
            assert not should_stop()
            beat()
        return {"held": 2.5}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    run = SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(eval_iters=3)))
    sync = SimpleNamespace(beat=lambda: beats.append(1))
    own = SimpleNamespace(
        run=run, model=SimpleNamespace(chunks=[]), device=None, iteration=7, consumed_samples=28,
        data=SimpleNamespace(validation={"held": None}), _begin=lambda phase: None,
        control=SimpleNamespace(stop=SimpleNamespace(agreed=lambda: None), sync=sync),
        garbage=SimpleNamespace(around_validation=contextlib.nullcontext),
    )  # fmt: skip
    metrics = SimpleNamespace(log_validation=lambda *values: logged.append(values))
    trainer.Trainer._validate(own, metrics)
    assert (len(beats), logged) == (3, [(7, 28, {"held": 2.5})])
