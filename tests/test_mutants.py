"""Mutation tests: which changes are made to a source, and how a changed module is imported."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tools.mutants import hook
from tools.mutants.__main__ import TARGETS
from tools.mutants.operators import mutants_of
from tools.mutants.recording import ROOT

CHANGES = {
    "x = a >= b": ["(a > b)"],
    "x = a != b": ["(a < b)", "(a == b)"],
    "x = a in b and not c": ["(a in b or not c)", "(a not in b)", "(c)"],
    "x = a + 2 * b": ["(2 / b)", "(a - 2 * b)", "3"],
    "x = rows[:n]": ["(n) + 1"],
    "x = f(a, size=0.5)": ["1.0", "f(a)"],
    "x = min(a, True)": ["False", "max"],
    "x = d['key']": ["'keyX'"],
    "close(a)": ["pass"],
    "for i in b: break": ["continue"],
    "n += 1": ["2", "n -= 1"],
    "def f(a=3) -> int: return a": ["(a) + 1", "4"],
    "def f(a) -> str | None: return a": ["None"],
    "class A:\n    '''Text.'''\n    a: int = Field(1, gt=0)": ["1", "2", "Field(1)"],
    # Unchanged: texts for people, types, and what no test should depend on.
    "'''Text.'''": [],
    "x: Literal['a'] = b": [],
    "assert a is not None": [],
    "print('a', 1)": [],
    "x = f'{1}' + g('two words')": [],
    "raise ValueError(1)": ["pass"],
    "from a import b": [],
    "x = f(timeout=3, help='a')": [],
    "WAIT_SECONDS = 3": [],
    "x = folder / 'a' / b": ["'aX'"],
}  # fmt: skip


@pytest.mark.parametrize("source", CHANGES)
def test_changes(source):
    found = mutants_of("a.py", source.encode())
    assert sorted(mutant.after for mutant in found) == CHANGES[source]
    for mutant in found:
        changed = mutant.source(source.encode()).decode()
        compile(changed, "a.py", "exec")
        assert changed.replace(mutant.after, mutant.before, 1) == source or mutant.after in source
    assert len({mutant.id for mutant in found}) == len(found)


def test_positions_after_wide_characters():
    """The syntax tree counts bytes."""
    (mutant,) = mutants_of("a.py", 'x = {"日 本": y < z}'.encode())
    assert mutant.source('x = {"日 本": y < z}'.encode()).decode() == 'x = {"日 本": (y <= z)}'


def test_where_a_statement_is_executed():
    source = b"SIZE = 1\n\ndef f(\n    a=2,\n):\n    if a:\n        return 3\n    g(\n        4)\n"
    places = {m.before: (m.name, m.first_line, m.last_line) for m in mutants_of("a.py", source)}
    assert places["1"] == ("SIZE", 1, 1)
    assert places["2"] == (None, 3, 9)  # a default value: by all lines of the function
    assert places["3"] == (None, 7, 7)
    assert places["4"] == (None, 8, 9)


def test_targets_exist():
    for name in TARGETS:
        assert (ROOT / "megatron_llmjp" / name).exists()


def test_a_changed_module_is_imported_from_text(tmp_path, monkeypatch):
    (tmp_path / "mutated_module.py").write_text("VALUE = 1\n")
    content = {"name": "mutated_module", "path": str(tmp_path / "mutated_module.py")}
    file = tmp_path / "mutant.json"
    file.write_text(json.dumps({**content, "source": "VALUE = 2\n"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hook.install(file)
    module = importlib.import_module("mutated_module")
    monkeypatch.delitem(sys.modules, "mutated_module")
    assert module.VALUE == 2 and Path(str(module.__file__)).read_text() == "VALUE = 1\n"
