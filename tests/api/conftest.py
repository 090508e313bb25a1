from __future__ import annotations

import pytest

from tests.support.tiny_run import make_tiny_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a small training run."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny") / "run")
