"""Fuzz tests of the tables and lists from which plan_folds makes fold files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_tools import plan_folds
from tests.support.datasets import write_dataset
from tests.support.fuzzing import Target, fuzz, run_main
from tests.support.fuzzing_mutators import mutated_bytes, mutated_json

FLAGS = ("--seq-length", "16", "--global-batch-size", "2", "--train-samples", "20", "--overwrite")
ANY = "."
"""Messages name the datasets or variables that a changed file mentions."""


def make(name: str, text: Callable[[Path], str], folder: Path) -> Path:
    write_dataset(folder / "a", 30, seed=1)
    path = folder / name
    path.write_text(text(folder))
    return path


def plan(flag: str, path: Path) -> None:
    target = path.parent / "folds.yaml"
    run_main(plan_folds.main, "--new", target, flag, path, *FLAGS, "--json")
    run_main(plan_folds.main, "--fold-file", target, *FLAGS[:6], "--json")


def script(folder: Path) -> str:
    return (
        f'DATA={folder}\nTRAIN_DATA_PATH=""\n# a "comment\'s"\n'
        'TRAIN_DATA_PATH="${TRAIN_DATA_PATH} 2.5 ${DATA}/a"\nVALID_DATA_PATH=(1 $DATA/a)\n'
        "python x.py \\\n --data-path ${TRAIN_DATA_PATH} \\\n --split 1,0,0\n"
    )


def bombs(_: bytes) -> list[bytes]:
    """Return texts whose expansion or parsing could take long."""
    return [
        b'TRAIN_DATA_PATH="1 a"\n' + b'TRAIN_DATA_PATH="$TRAIN_DATA_PATH$TRAIN_DATA_PATH"\n' * 60,
        b"TRAIN_DATA_PATH=(\n" * 20_000,
        b"A='\n" * 40_000,
        b'A="\n' * 40_000,
        b"--data-path a " * 10_000,
        b"1 a " * 2_000,
        b"$(" * 50_000,
    ]


TARGETS = {
    "list.sh": Target(
        partial(make, "list.sh", script), partial(plan, "--data-list"), (mutated_bytes,), bombs,
        60, ANY,
    ),
    "table.csv": Target(
        partial(make, "table.csv", lambda f: f"path,weight,name\n{f / 'a'},2,x\n"),
        partial(plan, "--table"), examples=80, names=ANY,
    ),
    "table.json": Target(
        partial(make, "table.json", lambda f: json.dumps([{"path": str(f / "a"), "tokens": 400}])),
        partial(plan, "--table"), (mutated_json, mutated_json, mutated_bytes), examples=80,
        names=ANY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
