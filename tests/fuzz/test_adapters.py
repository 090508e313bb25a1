"""Fuzz tests of LoRA adapters, chat templates and the journal of ``--follow``."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from megatron_llmjp.convert.follow.journal import JOURNAL, CheckpointId, Journal
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.convert.opening import open_source
from megatron_llmjp.convert.tuning.chat_template import read_chat_template
from tests.fuzz.test_checkpoints import FIXTURES, JSON, hostile_headers, mutated_header
from tests.support.fuzzing import Target, fuzz
from tests.support.fuzzing_mutators import mutated_bytes, mutated_json_lines

PEFT = FIXTURES / "peft" / "llama"


def copy_adapter(name: str, folder: Path) -> Path:
    shutil.copytree(PEFT / "adapter", folder, dirs_exist_ok=True)
    return folder / name


def merge(path: Path) -> None:
    options = ConversionOptions(adapter=path.parent)
    for name, read in open_source("hf", PEFT / "base", options).reads.items():
        assert read.read(name).shape == read.shape


def write_template(folder: Path) -> Path:
    path = folder / "chat.jinja"
    path.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m.content | trim }}{% endfor %}")
    return path


def write_journal(folder: Path) -> Path:
    journal = Journal(folder, Path("run"), "hf")
    for checkpoint in (CheckpointId(10, "a"), CheckpointId(20, "b")):
        journal.begin(checkpoint)
        journal.convert(checkpoint, 1.0)
        journal.command(checkpoint, 0, 2.5)
    return folder / JOURNAL


def read_journal(path: Path) -> None:
    for checkpoint in Journal(path.parent, Path("run"), "hf").converted():
        assert isinstance(checkpoint.iteration, int)


TARGETS = {
    "adapter_config.json": Target(
        partial(copy_adapter, "adapter_config.json"), merge, JSON, examples=100, names="input"
    ),
    "adapter_model.safetensors": Target(
        partial(copy_adapter, "adapter_model.safetensors"),
        merge,
        (mutated_header, mutated_bytes),
        hostile_headers,
        100,
        "input",
    ),
    "chat template": Target(write_template, read_chat_template),
    "follow.jsonl": Target(write_journal, read_journal, (mutated_json_lines, mutated_bytes)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
