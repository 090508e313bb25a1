"""Log lines in all formats: Megatron-LM's, short ones and JSON."""

from __future__ import annotations

import json
import os
import pty
import re

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.formatting import format_table, shorten, text_width
from megatron_llmjp.training import log_lines
from megatron_llmjp.training.log_lines import FoldPosition, LogLines, choose_format
from tests.support.training import arguments

VALUES = {
    "consumed tokens": 1.5e9,
    "seconds per iteration": 0.25,
    "TFLOP/s per GPU": 412.34,
    "MFU": 0.4167,
    "tokens per second": 123456.0,
    "learning rate": 3e-4,
    "global batch size": 512,
    "lm loss": 2.5,
    "z loss": 1e-3,
    "loss scale": 1.0,
    "grad norm": 0.5,
    "params norm": 321.0,
    "skipped iterations": 0,
    "nan iterations": 0,
    "seconds remaining": 93784.0,
}
FOLD = FoldPosition("fold01", 2, 11, 0.45)


def line(form: str, iteration: int = 100, fold: FoldPosition = FOLD, **changes: float) -> str:
    values = {**VALUES, **{name.replace("_", " "): value for name, value in changes.items()}}
    return LogLines(form, 5000).interval(iteration, 51200, values, fold)


def test_the_line_of_megatron_lm():
    found = line("megatron")
    assert "\n" not in found
    # Parts that scripts for Megatron-LM's log search for.
    for part in (
        "iteration      100/    5000 | consumed samples:        51200 |",
        "| elapsed time per iteration (ms): 250.0 |",
        "| throughput per GPU (TFLOP/s/GPU): 412.3 |",
        "| learning rate: 3.000000E-04 | global batch size:   512 | lm loss: 2.500000E+00 |",
        "| loss scale: 1.0 | grad norm: 0.500 | params norm: 321.000 |",
        "| number of skipped iterations:   0 | number of nan iterations:   0 |",
    ):
        assert part in found
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration ", found)
    assert "| MFU: 41.7% | tokens/s: 123.46K |" in found and "z loss: 1.000000E-03" in found
    assert "| fold: fold01 (2/11) 45% | remaining: 1d 02:03:04 |" in found
    counts = "| number of nan iterations:   0 | number of spikes:   2 | number of rollbacks:   1 |"
    assert counts in line("megatron", spikes=2, rollbacks=1)
    without = line("megatron", lm_loss=float("nan"))
    assert "lm loss" not in without and "grad norm: 0.500" in without


@pytest.mark.parametrize("name", ["MFU", "z loss", "params norm"])
def test_metrics_that_a_run_lacks_are_omitted(name):
    values = {key: value for key, value in VALUES.items() if key != name}
    for form in ("megatron", "short", "json"):
        assert name not in LogLines(form, 9).interval(1, 2, values, FOLD)


@pytest.mark.parametrize("form", ["megatron", "short", "json"])
def test_no_throughput_of_zero(form):
    values = {**VALUES, "TFLOP/s per GPU": 0.9}
    assert "TFLOP" not in LogLines(form, 9).interval(1, 2, values, FOLD)


def test_the_short_line():
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d   100/5000  loss 2\.5000  grad 0\.500  lr 3\.00e-04  123\.46K tok/s  "
        r"412\.3 TFLOP/s  fold01 2/11 45%  ETA 1d 02:03",
        line("short"),
    )
    assert "loss nan  skipped 3  NaN 2  spikes 1" in line(
        "short", lm_loss=float("nan"), skipped_iterations=3, nan_iterations=2, spikes=1
    )


@pytest.mark.parametrize("name", ["f", "web-crawl-2024-" * 9, "日本語の高品質なテキスト" * 5])
@pytest.mark.parametrize("iteration", [1, 12_345_678])
@pytest.mark.parametrize("count", [0, 999])
def test_short_lines_have_at_most_120_columns(name, iteration, count):
    changes = {"skipped_iterations": count, "spikes": count, "rollbacks": count, "lm_loss": 1e4}
    found = LogLines("short", 12_345_678).interval(
        iteration,
        10**9,
        {**VALUES, **{k.replace("_", " "): v for k, v in changes.items()}},
        FoldPosition(name, 10, 12, 1.0),
    )
    assert text_width(found) <= 120 and "ETA 1d 02:03" in found and "10/12 100%" in found


def test_validations():
    losses = {f"set {n}": 2.0 + n for n in range(12)}
    short = LogLines("short", 5000).validation(5, {**losses, "日" * 99: 1.0}).splitlines()
    assert len(short) > 2 and all(text_width(text) <= 120 for text in short)
    assert "   5/5000  validation loss  set 0 2.0000  set 1 3.0000" in short[0]
    assert LogLines("megatron", 9).validation(5, {"ja": 2.0}) == (
        " validation at iteration 5 | ja loss: 2.000000E+00 | ja PPL: 7.389056E+00 |"
    )
    parsed = json.loads(LogLines("json", 9).validation(5, {"ja": float("nan")}))
    assert parsed["iteration"] == 5 and parsed["validation/ja"] is None


def test_json_lines_have_the_names_of_the_metrics():
    parsed = json.loads(line("json", lm_loss=float("inf")))
    expected = {**VALUES, "lm loss": None}
    assert {name: parsed[name] for name in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", parsed["time"])
    position = {"iteration": 100, "train_iters": 5000, "consumed samples": 51200, "fold": "fold01"}
    assert {name: parsed[name] for name in position} == position


def test_the_default_format(monkeypatch):
    terminal, _ = pty.openpty()
    monkeypatch.setattr(log_lines, "_STDOUT", terminal)
    assert [choose_format(form) for form in (None, "megatron", "json")] == [
        "short", "megatron", "json",
    ]  # fmt: skip
    reader, _ = os.pipe()
    monkeypatch.setattr(log_lines, "_STDOUT", reader)
    assert choose_format(None) == "megatron"


def test_the_format_is_not_part_of_a_run(tmp_path):
    """A checkpoint does not contain it: a resumed run may have another one."""
    words = [*arguments("laptop-gpt2", tmp_path / "folds.yaml"), "--log-format", "json"]
    config = parse([str(word) for word in words]).config
    assert config.logging.log_format == "json" and "log_format" not in dump_config(config)


def test_columns_of_texts():
    assert [text_width(text) for text in ("abc", "日本", "が", "e\u0301")] == [3, 4, 2, 1]
    assert shorten("日本語", 5) == "日本…" and shorten("abc", 3) == "abc"
    assert format_table([["日本", "1"], ["a", "22"]], right=(1,)) == "日本   1\na     22"
