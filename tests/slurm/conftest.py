"""Fixture: one real Slurm for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import INSTALL, Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found: {INSTALL}")
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running
