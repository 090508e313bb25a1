from __future__ import annotations

import pytest

from tests.support.forks import warm_context


@pytest.fixture(autouse=True)
def warm_logits(monkeypatch):
    """Fork the process of ``--verify`` that computes logits with megatron-core."""
    monkeypatch.setattr(
        "megatron_llmjp.convert.verification.logits.get_context", lambda _: warm_context()
    )


@pytest.fixture
def convert(capsys):
    """Run the command; returns its output. ``code`` is the expected exit code."""
    from megatron_llmjp.convert.cli import main

    def run(*arguments: object, code: int = 0) -> str:
        found = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.out + captured.err

    return run
