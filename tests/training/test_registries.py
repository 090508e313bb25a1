"""One registry entry adds a metric or a learning-rate decay style everywhere."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from megatron_llmjp.config.lr_decay_styles import DECAY_STYLES
from megatron_llmjp.metric_registry import GROUPS, METRICS
from megatron_llmjp.report.page import write_report
from tests.support.datasets import write_folds
from tests.support.forks import ROOT, Fork
from tests.support.training import arguments, history

METRIC = """\
from megatron_llmjp.metric_panels import Panel
from megatron_llmjp.metric_registry import Metric, register_metric
register_metric(Metric("samples per second", "over the interval", lambda s: s.samples_per_second,
                "samples/s: {:.1f}".format, Panel("samples", "Samples per second")))
"""
STYLE = """\
from megatron_llmjp.config.lr_decay_styles import DecayStyle, register_decay_style
register_decay_style(DecayStyle("square", "(1 - x)^2", lambda part: (1 - part) ** 2))
"""


def pretrain_with(registration: str, *words: str) -> str:
    """Run pretrain_gpt.py with a registry entry added in one place; return its output."""
    program = Fork(register_and_train, registration, words)
    assert program.wait() == 0, program.stderr
    return program.stdout


def register_and_train(registration: str, words: tuple[str, ...]) -> None:
    for name in [name for name in sys.modules if name.startswith("megatron_llmjp")]:
        del sys.modules[name]  # imported again after the registration, as in a new interpreter
    exec(registration)
    sys.exit(importlib.import_module("megatron_llmjp.cli").main(words))


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> Path:
    return write_folds(tmp_path_factory.mktemp("folds"), (6, 4))


def test_a_registered_metric(folds, tmp_path):
    save = tmp_path / "run"
    words = arguments("laptop-gpt2", folds, "--save", save, "--report", "--eval-iters", 0)
    output = pretrain_with(METRIC, *words)
    assert len(re.findall(r"\| samples/s: [\d.]+ \|", output)) == 10
    assert len(history(save, "samples per second")) == 10

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(save / "tensorboard")).Reload()
    assert len(events.Scalars("samples per second")) == 10
    assert (save / "report" / "samples.png").stat().st_size > 0
    assert "Samples per second" in (save / "report" / "report.html").read_text()
    # Without the entry nothing of the metric is left.
    write_report(save, tmp_path / "report")
    assert not (tmp_path / "report" / "samples.png").exists()


def test_a_registered_decay_style(folds, tmp_path):
    assert "|WSD|square" in re.sub(r"\s", "", pretrain_with(STYLE, "--help"))
    save = tmp_path / "run"
    flags = ("--lr-decay-style", "square", "--lr", 1e-3, "--min-lr", 1e-4, "--lr-warmup-iters", 2)
    words = arguments("laptop-gpt2", folds, "--save", save, "--eval-iters", 0, *flags)
    words += ["--lr-decay-iters", "10"]
    expected = {i + 1: 1e-4 + 9e-4 * (1 - (i - 2) / 8) ** 2 for i in range(2, 10)}
    plan = pretrain_with(STYLE, *words, "--plan-data")
    assert f"{expected[6]:.4g}" in plan and f"{expected[10]:.4g}" in plan
    pretrain_with(STYLE, *words)
    rates = history(save, "learning rate")
    assert {i: rates[i] for i in expected} == pytest.approx(expected)


def test_the_tables_of_the_documentation_are_complete():
    text = (ROOT / "docs" / "training.md").read_text()
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.description} |" in text, name
    for prefix, group in GROUPS.items():
        assert f"| `{prefix}/NAME` | {group.description} |" in text, prefix
    for name, style in DECAY_STYLES.items():
        assert f"| `{name}` | {style.description} |" in text, name


def test_stored_names_are_json_keys(tmp_path):
    """Stored names are part of the format of ``metrics.jsonl``; old runs stay readable."""
    stored = {
        "lm loss", "z loss", "grad norm", "params norm", "learning rate", "global batch size",
        "loss scale", "skipped iterations", "nan iterations", "spikes", "total skipped iterations",
        "total nan iterations", "total spikes", "rollbacks", "seconds per iteration",
        "seconds remaining", "tokens per second", "TFLOP/s per GPU", "MFU", "consumed tokens",
        "fold number", "fold progress", "memory peak bytes", "memory allocated bytes",
        "memory reserved bytes", "computing seconds", "longest computing seconds",
        "waiting seconds", "slowest rank", "straggler share", "predicted seconds per iteration",
        "predicted computing seconds", "load balancing loss", "router z loss", "expert load",
        "dropped tokens",
    }  # fmt: skip
    assert set(METRICS) == stored
    groups = {"validation", "perplexity", "dataset loss", "consumed tokens", "expert load"}
    assert set(GROUPS) == groups
    assert json.loads(json.dumps(dict.fromkeys(METRICS))) == dict.fromkeys(METRICS)
