"""Pytest plugin that counts injected faults and their outcomes.

    python -m pytest -m fault -p tests.support.fault_results

It writes ``fault_results.json``, or the file given by ``FAULT_RESULTS``. Tests of faults have the
marker ``fault(name, outcome)``; a test of several faults, or of many injections, adds counts with
``record_property("fault: NAME", times)``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PREFIX = "fault: "


class Counts:
    """Counts of injected faults, by name."""

    def __init__(self) -> None:
        self.faults: dict[str, dict[str, Any]] = {}
        self.began = time.monotonic()

    def add(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Add the faults of a finished test."""
        marker = item.get_closest_marker("fault")
        if marker is None or not (report.when == "call" or report.skipped or report.failed):
            return
        name, outcome = marker.args
        times = {
            str(key)[len(PREFIX) :]: int(str(value))
            for key, value in report.user_properties
            if str(key).startswith(PREFIX)
        }
        for fault, number in (times or {name: 1}).items():
            entry = self.faults.setdefault(
                fault, {"outcome": outcome, "passed": 0, "failed": 0, "skipped": 0}
            )
            entry[report.outcome] += number

    def write(self, path: Path) -> None:
        """Write all counts as JSON."""
        about = {
            "day": time.strftime("%Y-%m-%d", time.gmtime()),
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "cores": os.cpu_count(),
            "seed": os.environ.get("FAULT_SEED", "20"),
        }
        path.write_text(json.dumps({**about, "faults": self.faults}, indent=1) + "\n")


_COUNTS = pytest.StashKey[Counts]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COUNTS] = Counts()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    item.config.stash[_COUNTS].add(item, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = Path(os.environ.get("FAULT_RESULTS", "fault_results.json"))
    session.config.stash[_COUNTS].write(path)
