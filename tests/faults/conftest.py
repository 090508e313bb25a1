"""Fixture with the datasets and reference runs of all fault tests."""

from __future__ import annotations

import pytest

from tests.faults.stage import Stage


@pytest.fixture(scope="session")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))
