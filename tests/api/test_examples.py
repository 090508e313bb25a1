"""Examples in the docstrings of the Python interface, executed in the folder of a small run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import megatron_llmjp as ml
from megatron_llmjp import api
from tests.support.forks import warm_context

MODULES = sorted(module.name for module in pkgutil.iter_modules(api.__path__))


def run_examples(folder: str) -> tuple[dict[str, int], str]:
    """Return the number of examples by name, and the report of failures."""
    os.chdir(folder)
    counts, report = {}, io.StringIO()
    with redirect_stdout(report):
        for name in MODULES:
            module = importlib.import_module(f"megatron_llmjp.api.{name}")
            finder = doctest.DocTestFinder(exclude_empty=False)
            for test in finder.find(module, name, globs={"ml": ml}):
                counts[test.name] = len(test.examples)
                doctest.DocTestRunner().run(test)
    return counts, report.getvalue()


@pytest.fixture(scope="module")
def examples(tiny_run):
    with ProcessPoolExecutor(1, mp_context=warm_context()) as pool:
        return pool.submit(run_examples, str(tiny_run)).result()


def test_all_examples_give_their_results(examples):
    assert examples[1] == ""


def test_every_public_function_has_an_example(examples):
    without = []
    for name in set(dir(ml)) - {"__version__"}:
        public = getattr(ml, name)
        if inspect.isclass(public) and issubclass(public, Exception):
            continue
        home = public.__module__.removeprefix("megatron_llmjp.api.") + "." + public.__name__
        methods = [
            f"{home}.{key}"
            for key, value in vars(public).items()
            if inspect.isclass(public) and inspect.isfunction(value) and not key.startswith("_")
        ]
        wanted = [home, *methods] if not inspect.isclass(public) else methods
        without += [each for each in wanted if not examples[0].get(each)]
    # `lineage` returns an internal object, for other modules of the interface.
    assert sorted(without) == ["schedules.FoldSchedule.lineage"]


def test_names_are_those_of_the_types_and_none_is_a_subpackage():
    stub = Path(ml.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    typed = {line.split()[-1] for line in stub.splitlines() if " as " in line}
    assert typed == set(dir(ml)) - {"__version__"}
    submodules = {module.name for module in pkgutil.iter_modules(ml.__path__)}
    assert not submodules & set(dir(ml))
    with pytest.raises(AttributeError, match="has no attribute 'lood_model'"):
        _ = ml.lood_model


def test_the_import_is_lazy():
    code = "import sys, megatron_llmjp; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "numpy", "pydantic", "yaml", "megatron", "transformers", "pandas"}
    assert not heavy & set(loaded)
