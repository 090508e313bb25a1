"""report_run: curves after restarts, and a self-contained page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_tools.report_run import main
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    dump_config,
    read_config,
    replace_fields,
)
from megatron_llmjp.report.history import FoldSpan, read_history
from megatron_llmjp.report.page import write_report_at_end
from megatron_llmjp.report.summary import summary_rows

PNG = b"\x89PNG"


def interval(
    iteration: int, loss: float | None, fold: str = "fold00", **more: Any
) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed samples": 16 * iteration,
        "lm loss": loss,
        "grad norm": 1.0,
        "learning rate": 1e-4 * iteration,
        "seconds per iteration": 0.5,
        "tokens per second": 4096.0,
        # Of four processes: 6 operations per parameter and token, and the scores.
        "TFLOP/s per GPU": 6 * (1024 * 128 + 737_280 + 4 * 128 * 128) * 4096e-12 / 4,
        "seconds remaining": 25.0,
        "MFU": 0.4,
        "global batch size": 16,
        "skipped iterations": 0,
        "fold": fold,
        "consumed tokens/日本語": 1000.0 * iteration,
        **more,
    }


def start(iteration: int) -> dict[str, Any]:
    return {"event": "start", "iteration": iteration, "consumed samples": 16 * iteration}


def fold(iteration: int, name: str) -> dict[str, Any]:
    return {"event": "fold", "iteration": iteration, "fold": name}


RECORDS = [
    start(0),
    fold(1, "fold00"),
    interval(10, 6.0),
    interval(20, 5.0),
    {"iteration": 20, "validation/ja": 5.1, "validation/<en>": 5.2},
    fold(24, "fold01"),
    {"event": "bad step", "iteration": 28, "why": "no numbers"},
    interval(30, None, "fold01", **{"nan iterations": 5, "rollbacks": 0}),  # NaN in older runs
    interval(40, 4.2, "fold01"),
    {"iteration": 40, "validation/ja": 1.0},  # of an iteration that is done again
    start(20),
    fold(24, "fold01"),
    interval(30, 4.5, "fold01"),
    interval(40, 4.0, "fold01"),
    {"iteration": 40, "validation/ja": 4.6, "validation/<en>": 4.4},
    interval(50, 3.9, "仕上げ"),
]


@pytest.fixture
def save(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    checkpoint = folder / "iter_0000020"
    checkpoint.mkdir(parents=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    lines.insert(6, "damaged")
    in_progress = '{"iteration": 60, "lm lo'
    (folder / "metrics.jsonl").write_text("\n".join([*lines, in_progress]), encoding="utf-8")
    layers = ConfigLayers()
    read_config("laptop-llama", layers)
    config = replace_fields(build_config(layers), vocab_size=1024, pipeline_model_parallel_size=2)
    (checkpoint / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (checkpoint / "manifest.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_later_iterations_hold(save):
    history = read_history(save)
    assert history.values("lm loss") == ([10, 20, 30, 40, 50], [6.0, 5.0, 4.5, 4.0, 3.9])
    assert [[r["lm loss"] for r in lost][1:] for lost in history.abandoned] == [[4.2]]
    assert history.restarts == [20]
    assert history.validation_sets()["ja"] == ([20, 40], [5.1, 4.6])
    assert history.damaged_lines == 1
    spans = [FoldSpan("fold00", 0, 23), FoldSpan("fold01", 23, 40), FoldSpan("仕上げ", 40, 50)]
    assert history.folds() == spans


def test_a_file_of_many_starts_without_events(save):
    records = [interval(1, 5.0), interval(2, 4.0), interval(3, 3.0), interval(2, 3.9)]
    (save / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    history = read_history(save)
    assert history.values("lm loss") == ([1, 2], [5.0, 3.9])
    assert history.restarts == [1]


def test_the_table(save):
    rows = dict(summary_rows(read_history(save)))
    assert rows["layout"] == "TP 1 x PP 2 x DP 2 on 4 processes"
    assert rows["iterations"] == "50" and rows["remaining"] == "00:00:25"
    assert rows["tokens"].startswith(f"{50 * 16 * 128:,}")
    assert rows["parameters"].startswith(f"{2 * 1024 * 128 + 738_432:,}")
    assert rows["best validation <en>"].startswith("4.4000 (perplexity 81.45) at 40")
    assert rows["restarts"].startswith("1, from 20")
    assert rows["exceptional events"] == "1, the last at 28: bad step: no numbers"
    assert rows["time in steps"] == "00:00:25"


def test_the_page_is_self_contained(save, tmp_path, capsys):
    before = files(save)
    assert main([str(save), "--output-dir", str(tmp_path / "report")]) == 0
    assert files(save) == before
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert "<title>run</title>" in page and "&lt;en&gt;" in page and "<en>" not in page
    pictures = {p.stem: p.read_bytes()[:4] for p in (tmp_path / "report").glob("*.png")}
    expected = {"loss", "validation", "learning_rate", "throughput", "gradient_norm", "datasets"}
    assert set(pictures) == expected and set(pictures.values()) == {PNG}
    assert "6 figures" in capsys.readouterr().out


def test_a_failing_report_does_not_fail_the_run(save, tmp_path, capsys):
    config = parse(["--config", "laptop-llama", "--save", str(save)]).config
    write_report_at_end(replace_fields(config, report=False))
    write_report_at_end(replace_fields(config, save=None))
    assert not (save / "report").exists() and capsys.readouterr().out == ""
    write_report_at_end(config)
    write_report_at_end(replace_fields(config, save=str(tmp_path / "nothing")))
    output = capsys.readouterr().out
    assert (save / "report/report.html").exists() and str(save) in output
    assert "the report was not written" in output


def test_another_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "--save" in capsys.readouterr().err
