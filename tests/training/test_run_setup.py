"""Checksums of sample indices, and the files that a run stores with its tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.training import run_setup


@pytest.mark.parametrize(("local_rank", "thorough"), [(0, True), (1, False)])
def test_validation_sets_are_verified_once_per_machine(monkeypatch, local_rank, thorough):
    sets = {name: SimpleNamespace(indices=[f"index of {name}"]) for name in ("one", "two")}
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


def test_the_loaded_checkpoints_chat_template_is_stored_again(tmp_path):
    """Unless the run's own tokenizer has one; a SentencePiece model has none."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("loaded")
    own = {name: tmp_path / name for name in ("tokenizer.model", "chat_template.jinja")}
    for path in own.values():
        path.write_text("own")
    for files, expected in (({"tokenizer.model"}, b"loaded"), (own.keys(), b"own")):
        tokenizer = SimpleNamespace(files=lambda files=files: {name: own[name] for name in files})
        run = SimpleNamespace(tokenizer=tokenizer, resume=SimpleNamespace(folder=tmp_path))
        stored = run_setup._tokenizer_files(run)
        assert stored == {"tokenizer.model": b"own", "chat_template.jinja": expected}
