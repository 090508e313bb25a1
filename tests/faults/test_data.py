"""Datasets and sample indices that change or are damaged between two starts of a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_llmjp.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from tests.faults.stage import Stage
from tests.support.datasets import VOCAB_SIZE

pytestmark = pytest.mark.long


@pytest.fixture
def own(tmp_path_factory) -> Stage:
    """Stage with its own data, which a test may damage."""
    return Stage(tmp_path_factory.mktemp("own"))


def truncated(root: Path) -> None:
    os.truncate(root / "ja.bin", (root / "ja.bin").stat().st_size // 2)


def of_another(root: Path) -> None:
    shutil.copy(root / "en.idx", root / "ja.idx")


def garbled(root: Path) -> None:
    (root / "ja.idx").write_bytes(b"\0" * (root / "ja.idx").stat().st_size)


def replaced(root: Path) -> None:
    """Replace the dataset by one of other documents with the same name."""
    for suffix in (".bin", ".idx"):
        shutil.copy(root / f"en{suffix}", root / f"ja{suffix}")


DAMAGES = {
    "truncated .bin": (truncated, "ja.bin: "),
    ".idx of another dataset": (of_another, "fold 'fold00' has changed"),
    "garbage in .idx": (garbled, "ja.idx: not a Megatron index"),
    "rebuilt from other documents": (replaced, "fold 'fold00' has changed"),
}


@pytest.mark.fault(
    "dataset", "refused before training, exit code 2; the same losses and weights once repaired"
)
def test_a_dataset_damaged_between_two_starts(own, record_property):
    """The run is refused before training; once the dataset is repaired, it resumes."""
    save = own.folder("half")
    assert own.run("alone", save, "--exit-interval", 6)[0] == EXIT_REQUEUE
    good = own.root / "good"
    good.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy2(own.root / f"ja{suffix}", good)
    for name, (damage, said) in DAMAGES.items():
        damage(own.root)
        code, _, errors = own.run("alone", save)
        assert code == EXIT_USER_ERROR, errors
        assert said in errors and "Traceback" not in errors, errors
        for suffix in (".bin", ".idx"):
            shutil.copy2(good / f"ja{suffix}", own.root)
        record_property(f"fault: dataset: {name}", 1)
    own.resume_and_prove("alone", save)


@pytest.mark.fault(
    "dataset: token id beyond the vocabulary", "dataset and document named, exit code 2"
)
@pytest.mark.parametrize(("layout", "workers"), [("alone", 0), ("alone", 1), ("dp2", 0)])
def test_a_token_beyond_the_vocabulary_is_reported(own, layout, workers):
    good = (own.root / "ja.bin").read_bytes()
    tokens = np.frombuffer(good, np.uint16).copy()
    tokens[::5] = VOCAB_SIZE + 7  # any first batch has some of them
    (own.root / "ja.bin").write_bytes(tokens.tobytes())
    save = own.folder("vocabulary")
    code, _, errors = own.run(layout, save, "--num-workers", workers)
    assert code == EXIT_USER_ERROR and not save.exists(), errors
    assert f"{own.root / 'ja'} (id {VOCAB_SIZE + 7})" in errors
    disabled = ("skip_token_id_check",)  # as for rare ids in a large dataset
    code, _, errors = own.run(layout, save, "--num-workers", workers, fault=disabled)
    assert code == EXIT_USER_ERROR, errors
    assert f"error: dataset {own.root / 'ja'}, document " in errors
    assert f"token id {VOCAB_SIZE + 7} is outside the vocabulary" in errors
    assert "Traceback" not in errors
    (own.root / "ja.bin").write_bytes(good)
    own.resume_and_prove(layout, save, "--num-workers", workers)


@pytest.mark.fault("index cache damaged", "rebuilt; the same losses and weights")
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "garbage"])
def test_a_damaged_index_is_rebuilt(own, how):
    save = own.folder("half")
    cache = own.root / "cache"
    flags = ("--data-cache-path", cache)
    assert own.run("alone", save, "--exit-interval", 6, *flags)[0] == EXIT_REQUEUE
    files = [path for path in cache.rglob("*.npy") if path.stat().st_size > 200]
    assert files
    for path in files:
        contents = bytearray(path.read_bytes())
        if how == "missing":
            path.unlink()
            continue
        if how == "truncated":
            del contents[len(contents) // 2 :]
        elif how == "flipped":
            contents[-1] ^= 255
        else:
            contents = bytearray(len(contents))
        path.write_bytes(contents)
    _, errors = own.resume_and_prove("alone", save, *flags)
    assert "rebuilding this index" in errors
