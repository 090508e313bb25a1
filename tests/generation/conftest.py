"""Small models of transformers, as native checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_llmjp.convert.cli import main as convert
from tests.convert.hf_models import MODELS


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders with ``hf`` and ``native`` of each architecture; LLaMA has query groups."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        folder = root / name
        make().save_pretrained(folder / "hf")
        words = ["--to", "native", "--input", folder / "hf", "--output", folder / "native"]
        assert convert(list(map(str, words))) == 0
    return {name: root / name for name in MODELS}
