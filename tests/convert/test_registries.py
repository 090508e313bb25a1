"""Registries of checkpoint formats and Hugging Face architectures: one entry adds one of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import transformers

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.safetensors import plan_safetensors, read_header
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.architectures import llama as llama_module
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import ARCHITECTURES
from megatron_llmjp.convert.formats.registry import FORMATS, CheckpointFormat
from megatron_llmjp.convert.plan import OutputPlan, TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import whole
from tests.convert.hf_models import llama, noisy, state
from tests.support.processes import ROOT


def rows_of(heading: str) -> list[str]:
    """Rows of the first table in docs/convert.md whose heading starts with a text."""
    text = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert table is not None
    return table[1].splitlines()


def test_the_docs_list_every_format():
    expected = [f"| `{entry.name}` | {entry.description} |" for entry in FORMATS.values()]
    assert rows_of("format") == expected


def test_the_docs_list_every_architecture():
    assert rows_of("architecture") == [
        f"| {entry.class_name} | `{entry.model_type}` | {entry.models} |"
        for entry in ARCHITECTURES.values()
    ]


def read_toy(path, _options) -> SourceCheckpoint:
    tensors = read_header(path / "toy.safetensors")
    model = ModelConfig.model_validate_json((path / "toy.json").read_text())
    reads = {name: TensorRead(tuple(t.shape), t.dtype, [t]) for name, t in tensors.items()}
    return SourceCheckpoint("toy", path, model, reads, "one file")


def plan_toy(source, options) -> OutputPlan:
    file = plan_safetensors(
        "toy.safetensors",
        {name: (read.shape, options.dtype_of(read)) for name, read in source.reads.items()},
    )
    writes = {name: TensorWrite(whole, [[slot]]) for name, slot in file.slots.items()}

    def finish(folder, _checksums) -> None:
        (folder / "toy.json").write_text(source.model.model_dump_json())

    return OutputPlan([file], writes, finish)


TOY = CheckpointFormat(
    "toy",
    "canonical tensors in one file",
    lambda path: (path / "toy.json").is_file(),
    read_toy,
    plan_toy,
    stores_tokenizer=True,
)


def test_a_registered_format_is_available_everywhere(tmp_path, convert, monkeypatch, capsys):
    monkeypatch.setitem(FORMATS, "toy", TOY)
    with pytest.raises(SystemExit):
        convert("--help")
    text = capsys.readouterr().out
    assert "megatron-deepspeed, toy" in text
    assert "to native or hf or toy" in " ".join(text.split())  # a capability
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "toy", "--input", tmp_path / "hf", "--output", tmp_path / "toy")
    assert "can be converted to: native, hf, megatron-lm" in convert("inspect", tmp_path / "toy")
    convert("--to", "hf", "--input", tmp_path / "toy", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    error = convert(
        *("--to", "toy", "--verify", "--input", tmp_path / "hf", "--output", tmp_path / "x"),
        code=2,
    )
    assert "--verify: not supported for toy" in error


def qwen2_from_config(config, where) -> ModelConfig:
    model = llama_module.ARCHITECTURE.from_config(config, where)
    return model.model_copy(update={"add_qkv_bias": True})


QWEN2 = replace(
    llama_module.ARCHITECTURE,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    models="test",
    requirements=lambda model: {
        **llama_module.ARCHITECTURE.requirements(model.model_copy(update={"add_qkv_bias": False})),
        "linear layers without add_qkv_bias": model.add_qkv_bias,
    },
    from_config=qwen2_from_config,
)


def test_a_registered_architecture_is_converted_both_ways(tmp_path, convert, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "qwen2", QWEN2)
    config = transformers.Qwen2Config(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    noisy(transformers.Qwen2ForCausalLM(config)).save_pretrained(tmp_path / "hf")
    there = ("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    assert "largest logit difference" in convert(*there, "--verify")
    assert "Hugging Face: Qwen2ForCausalLM" in convert("inspect", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").model_type == "qwen2"
