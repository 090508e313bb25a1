"""The rules of docs/architecture.md: layers, imports without torch, the table of tasks."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from tests.support.processes import ROOT
from tools.draw_architecture import (
    PICTURE,
    dependency_graph,
    depths,
    draw,
    imports,
    module_graph,
)

LAYERS = [
    {"errors", "formatting", "project_files", "versions", "interval_stats", "metric_panels"},
    {"large_imports"},
    {"transformer_engine_import"},
    {"completion", "doctor"},
    {"yaml_text", "filesystem", "arguments", "metric_registry"},
    {"config", "retrying_file"},
    {"tokenizers"},
    {"patches"},
    {"parallel"},
    {"preflight"},
    {"data", "model"},
    {"checkpoint"},
    {"inference"},
    {"run_data"},
    {"placeholders"},
    {"run"},
    {"estimate"},
    {"report"},
    {"convert"},
    {"generation"},
    {"alerts"},
    {"start_checks"},
    {"training"},
    {"planning"},
    {"cli"},
    {"data_tools", "slurm"},
    {"api"},
]
"""From the lowest to the highest; a part imports from lower layers only."""

WITHOUT_TORCH = [
    "megatron_llmjp.cli",
    "megatron_llmjp.run",
    "megatron_llmjp.start_checks",
    "megatron_llmjp.estimate.run_estimate",
    "megatron_llmjp.report.page",
    "megatron_llmjp.checkpoint.resume",
    "megatron_llmjp.checkpoint.retention",
    "megatron_llmjp.convert.cli",
    "megatron_llmjp.preflight.report",
    "data_tools.generate",
    "data_tools.preprocess_data",
    "data_tools.plan_folds",
    "slurm.alert",
    "slurm.requeue",
]

TASKS = re.findall(
    r"^\| [^|]+ \| `([\w/.-]+\.py)`: `(\w+)`", (ROOT / "docs/architecture.md").read_text(), re.M
)


def test_imports_go_down():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = [found.text for found in imports() if layer[found.source] <= layer[found.target]]
    assert wrong == []


def test_no_module_imports_itself_through_others():
    depths(module_graph())  # raises on circular imports


def test_the_picture_is_drawn_from_the_imports():
    depths(dependency_graph())  # raises on circular imports
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run python tools/draw_architecture.py"


def test_no_torch_where_it_is_not_needed():
    code = f"""\
import importlib, sys
for name in {WITHOUT_TORCH}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_table_has_the_commonest_tasks():
    assert len(TASKS) >= 12


@pytest.mark.parametrize(("path", "symbol"), TASKS)
def test_the_table_of_tasks_names_what_exists(path, symbol):
    folder = ROOT if (ROOT / path).is_file() else ROOT / "megatron_llmjp"
    module = (folder / path).relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    assert hasattr(importlib.import_module(module), symbol)
