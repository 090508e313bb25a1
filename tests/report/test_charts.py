"""The interactive page: its data, its structure, and its computations in Node.js."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.report_run import main
from megatron_llmjp.report.charts.decimation import MAX_POINTS, reduce_curve
from megatron_llmjp.report.charts.marks import ROLLBACK_TEXT, SPIKE_TEXT, Mark, limit_marks
from megatron_llmjp.report.charts.page_data import page_data, script_json
from megatron_llmjp.report.history import MetricsHistory
from megatron_llmjp.report.page import comparison_page
from tests.support.processes import ROOT

ASSETS = ROOT / "megatron_llmjp/report"
VENDORED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
HOSTILE = 'x</script><img src=x onerror="alert(1)"><!-- & \u2028'


class Page(HTMLParser):
    """Elements of a page: tags with attributes, and the texts of scripts and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.texts["script"][0])
        return found


def record(iteration: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed samples": 4 * iteration,
        "consumed tokens": 400 * iteration,
        "lm loss": loss,
        "grad norm": 1.0 + iteration,
        "memory peak bytes": 2e9,
        "fold": "fold00" if iteration <= 3 else HOSTILE,
        **more,
    }


RECORDS = [
    {"event": "start", "iteration": 0},
    *(record(i, 5.0 - i / 10) for i in range(1, 5)),
    {"event": "bad step", "iteration": 4, "why": f"iteration 4: {SPIKE_TEXT}; {ROLLBACK_TEXT}"},
    {"event": "start", "iteration": 2},
    record(3, 4.75),
    {"iteration": 3, "validation/ja": 4.5},
    {"event": "bad step", "iteration": 4, "why": f"iteration 4: {SPIKE_TEXT}; applied"},
    {"event": "bad step", "iteration": 5, "why": "iteration 5: a NaN"},
    {"event": "straggler", "iteration": 5, "why": "slow"},
    record(6, None),
    record(7, 4.125),
    {"event": "end", "iteration": 7, "outcome": "failed", "why": HOSTILE},
]


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    for iteration in (2, 6):
        checkpoint = folder / f"iter_{iteration:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    other = [record(2 * i, 6.0 - i) for i in range(1, 4)]
    return [write_run(tmp_path / "a/save", RECORDS), write_run(tmp_path / "b/save", other)]


@pytest.fixture
def page(runs: list[Path], tmp_path: Path) -> Page:
    output = tmp_path / "page.html"
    words = ["--labels", HOSTILE, "second", "-o", str(output)]
    assert main([*map(str, runs), *words]) == 0
    return Page(output.read_text(encoding="utf-8"))


def test_the_data_are_those_of_the_metrics(page):
    first, second = page.data["runs"]
    assert first["curves"]["lm loss"] == {"x": [1, 2, 3, 7], "y": [4.9, 4.8, 4.75, 4.125]}
    assert first["curves"]["repeated"] == {"x": [3, 4], "y": [4.7, 4.6]}
    assert first["curves"]["validation/ja"] == {"x": [3], "y": [4.5]}
    assert first["curves"]["memory peak bytes"]["y"] == [2] * 5
    assert second["curves"]["grad norm"] == {"x": [2, 4, 6], "y": [3, 5, 7]}
    assert second["tokens"] == [[0, 2, 4, 6], [0, 800, 1600, 2400]]
    assert [fold["name"] for fold in first["folds"]] == ["fold00", HOSTILE]
    kinds = [(kind, iteration) for kind, iteration, _ in first["marks"]]
    assert kinds == [
        ("spike", 4), ("bad step", 5), ("rollback", 4), ("straggler", 5), ("restart", 2),
        ("failure", 7), ("checkpoint", 2), ("checkpoint", 6),
    ]  # fmt: skip
    panels = {panel["name"]: panel for panel in page.data["panels"]}
    assert {"loss", "gradient_norm", "memory"} == set(panels)
    assert panels["gradient_norm"]["log"] and panels["memory"]["zero"]
    labels = [curve["label"] for curve in panels["loss"]["curves"]]
    assert labels == ["training", "repeated", "validation ja"]


def test_names_are_text_and_nothing_is_loaded(page):
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert "img" not in page.texts  # two runs have no drawn figures
    sources = [found.get(name) for _, found in page.tags for name in ("src", "href")]
    assert set(sources) == {None}
    assert HOSTILE in page.texts["title"][0] and page.data["runs"][0]["name"] == HOSTILE
    texts = [*page.texts["script"][1:], *page.texts["style"]]
    for forbidden in (r"\bfetch\(", "XMLHttpRequest", r"\bimport\b\(?", r"url\(", "innerHTML"):
        assert not re.search(forbidden, "".join(texts)), forbidden


def test_the_policy_allows_the_embedded_scripts_only(page):
    policy = next(found["content"] for _, found in page.tags if "http-equiv" in found)
    scripts = page.texts["script"][1:]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    )


def test_a_page_without_scripts(page, runs, tmp_path):
    cells = page.texts["td"]
    assert cells[cells.index("7") :][:3] == ["7", "4.1250", "–"]  # losses at iteration 7
    assert main([str(runs[0]), "-o", str(tmp_path / "one.html")]) == 0
    one = (tmp_path / "one.html").read_text(encoding="utf-8")
    fallback = one.partition("<noscript>")[2].partition("</noscript>")[0]
    assert fallback.count("<img ") == 3  # loss, gradient norm, memory
    assert Page(one).texts["h1"] == ["a/save"]  # "save" alone does not identify a run


def test_vendored_files_are_unchanged():
    for name, digest in VENDORED.items():
        contents = (ASSETS / "vendor/uplot" / name).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == digest, name


def test_reasons_of_bad_steps_are_those_of_the_gradient_monitor():
    text = (ROOT / "megatron_llmjp/training/gradient_monitor.py").read_text()
    assert SPIKE_TEXT in text and ROLLBACK_TEXT in text


def test_spikes_survive_the_reduction():
    random = np.random.default_rng(0)
    y = random.normal(3.0, 0.1, 100_000)
    y[[12_345, 77_777]] = 9.0, -2.0
    x = np.arange(10, 1_000_010, 10)
    curve = reduce_curve(x.tolist(), y.tolist())
    assert len(curve.x) <= MAX_POINTS and curve.x == sorted(set(curve.x))
    assert set(zip(curve.x, curve.y, strict=True)) <= set(zip(x.tolist(), y.tolist(), strict=True))
    assert (curve.x[0], curve.x[-1]) == (10, 1_000_000)
    assert (123_460, 9.0) in zip(curve.x, curve.y, strict=True)
    assert (777_780, -2.0) in zip(curve.x, curve.y, strict=True)
    assert curve.mean_y == pytest.approx(y.reshape(500, 200).mean(axis=1).tolist())


def test_a_long_run_is_a_small_page(tmp_path):
    run = MetricsHistory(tmp_path, [record(i, 3.0, fold=f"f{i}") for i in range(1, 20_001)])
    data = page_data([run], ["long"])
    assert len(script_json(data)) < 500_000
    assert len(data["runs"][0]["tokens"][0]) <= 1_000
    marks = limit_marks([Mark("spike", i) for i in range(2_000)])
    assert [mark.iteration for mark in marks] == list(range(0, 2_000, 4))


def test_the_comparison_shows_different_settings(runs):
    text = comparison_page([MetricsHistory(runs[0]), MetricsHistory(runs[1])])
    assert "no checkpoint yet: a/save, b/save" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "x"], "--labels has 1 names, but there are 2 runs"),
        (["--labels", "x", "x"], "the names must differ"),
        (["--output-dir", "d"], "--output-dir is for one run"),
        (["-o", "missing/page.html"], "the folder missing does not exist"),
    ],
)
def test_wrong_requests(runs, words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, runs), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def in_node(expression: str) -> Any:
    """Evaluate an expression of the page's functions."""
    script = f"""
        const Curves = require({json.dumps(str(ASSETS / "charts/assets/curves.js"))});
        console.log(JSON.stringify({expression}));"""
    return json.loads(
        subprocess.run(["node", "-e", script], capture_output=True, check=True).stdout
    )


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_the_functions_of_the_page():
    values = np.random.default_rng(1).normal(size=50)
    weights = [[0.9 ** (n - k) for k in range(n + 1)] for n in range(50)]
    expected = [np.average(values[: len(w)], weights=w) for w in weights]
    given = json.dumps(values.tolist())
    found = in_node(
        f"""{{
        smooth: Curves.smooth({given}, 0.9),
        nearest: [-5, 0, 1.4, 1.6, 7, 99].map(at => Curves.nearest([0, 1, 2, 8], at)),
        between: [0, 5, 15, 40].map(at => Curves.interpolate([[0, 10, 20], [0, 100, 400]], at)),
        plain: Curves.lines({{x: [1, 2], y: [3, 4]}}, 0, x => 10 * x),
        reduced: Curves.lines({{x: [1, 2], y: [3, 4], mx: [1.5], my: [3.5]}}, 0, x => x),
        limits: Curves.limits([1, 2, 3], [[9, 2, 4], [null, 3, undefined]], 2, 3, {{}}),
        zero: Curves.limits([1, 2], [[5, 10]], 0, 9, {{zero: true}}),
        log: Curves.limits([1, 2], [[0, 10]], 0, 9, {{log: true}}),
        none: Curves.limits([1], [[null]], 0, 9, {{}}),
        texts: [0, 0.00012345, 2.345678, 12345.6, 3.2e9].map(Curves.number),
        ticks: [[0, 5e5, 1e6], [1000500, 1001000], [1e-4]].map(Curves.ticks),
        folds: [1, 3, 4, 9].map(at => Curves.foldAt(
            [{{name: "a", first: 0, last: 3}}, {{name: "b", first: 3, last: 8}}], at)),
        }}"""
    )
    assert found["smooth"] == pytest.approx(expected)
    assert found["nearest"] == [0, 0, 1, 2, 3, 3]
    assert found["between"] == [0, 50, 250, 1000]
    assert found["plain"] == {"strong": {"x": [10, 20], "y": [3, 4]}, "faint": None}
    assert found["reduced"]["strong"] == {"x": [1.5], "y": [3.5]}
    assert found["reduced"]["faint"] == {"x": [1, 2], "y": [3, 4]}
    assert found["limits"] == pytest.approx([1.88, 4.12])
    assert found["zero"] == pytest.approx([0, 11]) and found["none"] is None
    assert found["log"] == pytest.approx([10 / 1.15, 11.5])
    assert found["texts"] == ["0", "1.234e-4", "2.3457", "12,346", "3.2B"]
    assert found["ticks"] == [["0", "500K", "1M"], ["1.0005M", "1.001M"], ["1e-4"]]
    assert found["folds"] == ["a", "a", "b", ""]
