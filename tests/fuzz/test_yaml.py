"""Fuzz tests of YAML files: fold files, configurations, and those in checkpoints."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    dump_config,
    load_config,
    read_config,
)
from megatron_llmjp.data.folds.data_path import fold_file_from_flags
from megatron_llmjp.data.folds.loading import read_fold_file
from tests.support.fuzzing import Target, fuzz
from tests.support.fuzzing_mutators import (
    DEEP_YAML,
    HOSTILE,
    RAW_YAML,
    mutated_bytes,
    mutated_json,
    mutated_yaml,
    yaml_bomb,
)

FOLDS = """\
seed: 7
sequence_length: 32
root: data
include: corpus.yaml
blends:
  web: {a: {path: a, tokens: 1.3B}, b: {path: b, tokens: 2_000}}
folds:
  - name: first
    iterations: 6
    blend: {ja: {path: ja, weight: 1, repeat: true}, en: {path: en, weight: 2}}
    learning_rate: {lr: 1.0e-4, lr_decay_style: cosine, lr_warmup_iters: 2}
  - {name: second, blend: [web, code]}
  - {name: third, order: megatron, samples: 1e3, split: "969,30,1", blend: {x: {path: x}}}
  - {name: fourth, epochs: 1.5, blend: [{path: p/q}, {path: r/q, restart: true}]}
validation:
  valid: {path: valid}
  test: {blend: {x: {path: x}}, split: "99,1,0", part: test}
skip:
  - samples: [16, 32]
"""
"""A fold file with every feature."""


def write_fold_file(folder: Path) -> Path:
    (folder / "corpus.yaml").write_text("blends: {code: {c: {path: c, tokens: 5}}}\n")
    path = folder / "folds.yaml"
    path.write_text(FOLDS)
    return path


def write_included_file(folder: Path) -> Path:
    write_fold_file(folder)
    return folder / "corpus.yaml"


def read_including_file(path: Path) -> object:
    return read_fold_file(path.with_name("folds.yaml"))


def write_config(folder: Path) -> Path:
    layers = ConfigLayers()
    read_config("laptop-llama", layers)
    path = folder / "config.yaml"
    path.write_text(dump_config(build_config(layers)))
    return path


def write_run_config(folder: Path) -> Path:
    content = yaml.safe_load(write_config(folder).read_text())
    given = {k: {n: v for n, v in s.items() if v is not None} for k, s in content.items()}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"preset": "laptop-llama", **given}))
    return path


def read_run_config(path: Path) -> object:
    return parse(["--config", str(path), "--fold-file", "folds.yaml", "--train-iters", "3"])


def write_lists(folder: Path) -> Path:
    path = folder / "lists.json"
    path.write_text('{"train": ["0.3", "a", "0.7", "b"], "valid": "c d", "test": ["e"]}')
    return path


def read_lists(path: Path) -> object:
    data = data_config().model_copy(update={"per_split_data_args_path": str(path)})
    return fold_file_from_flags(data, 10, 1)


@lru_cache(maxsize=1)
def data_config():
    with tempfile.TemporaryDirectory() as folder:
        return load_config(write_config(Path(folder))).data


def write_list(folder: Path) -> Path:
    path = folder / "list.txt"
    path.write_text("0.3 a 0.7 b")
    return path


def read_list(path: Path) -> object:
    data = data_config().model_copy(update={"data_args_path": str(path)})
    return fold_file_from_flags(data, 10, 1)


def at_key(key: str):
    """Return hostile documents with every special YAML value at a key, and alias bombs."""
    values = [f"{key}: {value}\n".encode() for value in (*RAW_YAML, DEEP_YAML[1])]
    return lambda valid: [*values, yaml_bomb(key), valid + values[0]]


YAML = (mutated_yaml, mutated_yaml, mutated_bytes)

TARGETS = {
    "fold file": Target(write_fold_file, read_fold_file, YAML, at_key("folds"), 120),
    "included file": Target(
        write_included_file,
        read_including_file,
        YAML,
        lambda _: [yaml_bomb("blends")],
        30,
        common=len(HOSTILE),
        names=r"corpus\.yaml|fold 'second'|no blend named",
    ),
    "run configuration": Target(
        write_run_config,
        read_run_config,
        YAML,
        lambda _: [yaml_bomb("model")],
        40,
        common=len(HOSTILE),
        names=r"run\.yaml|no model is given",
    ),
    "configuration of a checkpoint": Target(
        write_config, load_config, YAML, at_key("model"), 40, common=len(HOSTILE)
    ),
    "lists of datasets": Target(
        write_lists, read_lists, (mutated_json, mutated_bytes), examples=100
    ),
    "list of datasets": Target(write_list, read_list, examples=50, names=r"list\.txt|--data-path"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
