"""Which tests execute a line, and how long they take: one run of the tests under coverage.

Functions are covered by the tests that call them. Lines of classes and modules are executed by
whatever imports them first: the tests of a constant or field are those of the lines that name it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import pytest
from coverage import CoverageData

from tools.mutants.operators import Mutant

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".mutants"
DATA, TIMES, SOURCES = FOLDER / "coverage", FOLDER / "durations.json", FOLDER / "sources.json"


def record(tests: Sequence[str]) -> None:
    """Run the tests under coverage; given files are added to what was recorded before."""
    FOLDER.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "--cov", "--cov-context=test", "--cov-report="]
    command += ["-q", "-m", "not long or fault", "-n", "2", "--dist", "loadfile"]
    command += ["-p", "tools.mutants.recording", *tests]
    command += ["--cov-append"] if tests else []
    environment = {**os.environ, "COVERAGE_FILE": str(DATA), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment)
    for late in FOLDER.glob(f"{DATA.name}.*"):
        late.unlink()  # of fork servers, which end last and have executed imports only
    SOURCES.write_text(json.dumps(_digests()))


def changed_sources() -> list[str]:
    """Return the files that changed since the recording, whose line numbers may be wrong."""
    recorded = json.loads(SOURCES.read_text())
    return [path for path, digest in _digests().items() if recorded.get(path) != digest]


def _digests() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((ROOT / "megatron_llmjp").rglob("*.py"))
    }


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the duration of a test and of its fixtures (a plugin of the recording run)."""
    _durations[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the durations of this run over earlier ones."""
    if not hasattr(session.config, "workerinput"):
        before = json.loads(TIMES.read_text()) if TIMES.exists() else {}
        TIMES.write_text(json.dumps(before | _durations, indent=0))


_durations: defaultdict[str, float] = defaultdict(float)


class Recording:
    """The recorded run."""

    def __init__(self) -> None:
        self._data = CoverageData(str(DATA))
        self._data.read()
        self.seconds: dict[str, float] = json.loads(TIMES.read_text())
        self._by_file: defaultdict[str, set[str]] = defaultdict(set)
        for test in self.seconds:
            self._by_file[test.split("::")[0]].add(test)
        self._lines = lru_cache(maxsize=None)(self._tests_by_line)
        self._mentions = lru_cache(maxsize=None)(self._tests_that_mention)

    def tests_of(self, mutant: Mutant) -> set[str]:
        """Return the tests that execute the changed statement; for a constant, its uses."""
        lines = range(mutant.first_line, mutant.last_line + 1)
        if mutant.name is None:
            return self._at(mutant.path, lines)
        found = set(self._mentions(mutant.name.rpartition(".")[2]))
        return found or self._at(mutant.path, self._lines(mutant.path))

    def of_file(self, file: str) -> list[str]:
        """Return the tests of a file."""
        return sorted(self._by_file[file])

    def _at(self, path: str, lines: Iterable[int]) -> set[str]:
        found = self._lines(path)
        return set().union(*(found.get(line, ()) for line in lines))

    def _tests_by_line(self, path: str) -> dict[int, set[str]]:
        """Return the tests of each line; those of a fixture's lines are all of its file."""
        tests: dict[int, set[str]] = {}
        for line, contexts in self._data.contexts_by_lineno(str(ROOT / path)).items():
            found = tests[line] = set()
            for context in contexts:
                test, _, phase = context.rpartition("|")
                if phase == "setup":
                    found |= self._by_file[test.split("::")[0]]
                elif test:
                    found.add(test)
            found &= self.seconds.keys()
        return tests

    def _tests_that_mention(self, name: str) -> set[str]:
        """Return the tests of all lines that contain a name."""
        word, found = re.compile(rf"\b{re.escape(name)}\b"), set[str]()
        for file in self._data.measured_files():
            path = Path(file).relative_to(ROOT).as_posix()
            text = Path(file).read_text(encoding="utf-8").splitlines()
            found |= self._at(path, (n for n, line in enumerate(text, 1) if word.search(line)))
        return found

    def choose(self, mutant: Mutant, budget: float) -> list[str]:
        """Return the tests to run, quickest first, up to a total of ``budget`` seconds.

        Tests of the folder that mirrors the package come before others that take a quarter of
        their time. Tests of a file are adjacent, since they share fixtures.
        """
        area = "tests/" + mutant.path.split("/")[1].removesuffix(".py")

        def cost(test: str) -> float:
            return (self.seconds[test] + 0.02) * (1 if test.startswith(area) else 4)

        chosen, total = defaultdict(list), 0.0
        for test in sorted(self.tests_of(mutant), key=lambda t: (cost(t), t)):
            if not total or total + self.seconds[test] <= budget:
                total += self.seconds[test]
                chosen[test.split("::")[0]].append(test)
        files = sorted(chosen, key=lambda file: sum(map(cost, chosen[file])))
        return [test for file in files for test in chosen[file]]
