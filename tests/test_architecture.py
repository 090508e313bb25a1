"""The floors of docs/architecture.md: imports go down, and what must not need torch does not."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.support.processes import ROOT

FLOORS = [
    {"errors", "formatting"},
    {"yaml_text"},
    {"filesystem"},
    {"config", "tokenizers", "retrying_file"},
    {"patches"},
    {"parallel"},
    {"data", "model"},
    {"checkpoint"},
    {"convert"},
    {"run_data"},
    {"placeholders"},
    {"run"},
    {"estimate"},
    {"report"},
    {"start_checks"},
    {"training"},
    {"planning"},
    {"cli"},
    {"data_tools", "slurm"},
]
"""Those of the documentation, with the arrows within a floor as floors of their own."""

WITHOUT_TORCH = [
    "megatron_llmjp.cli",
    "megatron_llmjp.run",
    "megatron_llmjp.start_checks",
    "megatron_llmjp.estimate.run_estimate",
    "megatron_llmjp.report.page",
    "megatron_llmjp.checkpoint.resume",
    "megatron_llmjp.checkpoint.retention",
    "megatron_llmjp.convert.cli",
    "data_tools.preprocess_data",
    "data_tools.plan_folds",
    "slurm.requeue",
]


def part(module: str) -> str | None:
    words = module.split(".")
    if words[0] == "megatron_llmjp":
        return words[1] if len(words) > 1 else None
    return words[0] if words[0] in ("data_tools", "slurm") else None


def imports() -> set[tuple[str, str, str]]:
    found = set()
    for folder in ("megatron_llmjp", "data_tools", "slurm"):
        for path in (ROOT / folder).rglob("*.py"):
            importer = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                for module in modules:
                    source, target = part(importer), part(module)
                    if source and target and source != target:
                        found.add((source, target, f"{importer} imports {module}"))
    return found


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        text
        for source, target, text in imports()
        if source != "__init__" and floor[source] <= floor[target]
    ]
    assert wrong == []


def test_no_torch_where_it_is_not_needed():
    code = f"""\
import importlib, sys
for name in {WITHOUT_TORCH}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
