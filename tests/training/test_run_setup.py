"""Which rank of a machine verifies the checksums of sample indices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.training import run_setup


@pytest.mark.parametrize(("local_rank", "thorough"), [(0, True), (1, False)])
def test_validation_sets_are_verified_once_per_machine(monkeypatch, local_rank, thorough):
    sets = {name: SimpleNamespace(index=f"index of {name}") for name in ("one", "two")}
    calls = []

    def ensured(indices, *, thorough, done):
        calls.append((indices, thorough, done))

    def beat() -> None:
        """Never called here."""

    monkeypatch.setattr(run_setup, "_epochs", lambda run: "epochs")
    monkeypatch.setattr(run_setup, "_validation_datasets", lambda run, epochs: sets)
    monkeypatch.setattr(run_setup, "ensure_indices", ensured)
    ranks = Ranks(8 + local_rank, 16, local_rank, "127.0.0.1", "1", "test")
    assert run_setup.open_validation_sets(None, ranks, beat) == sets
    assert calls == [(["index of one", "index of two"], thorough, beat)]
