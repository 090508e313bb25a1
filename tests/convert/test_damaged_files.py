"""Damaged files: errors of few lines that say what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_llmjp.convert.conversion import plan_conversion
from megatron_llmjp.convert.files.safetensors import read_header
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import gpt2, llama, state

FIXTURE = Path(__file__).parent / "fixtures" / "mds_llama_tp2pp2_fp32" / "ckpt"


def header(folder: Path, change) -> None:
    """Rewrite the header of a safetensors file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    value = change(json.loads(content[8 : 8 + length]))
    text = json.dumps(value).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: [h], "not a JSON object"),
        (lambda h: {**h, "model.norm.weight": 3}, "lacks dtype, shape or data_offsets"),
        (lambda h: {**h, "model.norm.weight":
                    {**h["model.norm.weight"], "data_offsets": [-256, 0]}}, "at -256 to 0"),
        (lambda h: {**h, "model.norm.weight":
                    {**h["model.norm.weight"], "data_offsets": [0, 256]}}, "overlap"),
        (lambda h: {**h, "model.norm.weight":
                    {**h["model.norm.weight"], "shape": [-8, -8]}}, "shape [-8, -8]"),
    ],
)  # fmt: skip
def test_invalid_headers_are_refused(tmp_path, change, message):
    llama().save_pretrained(tmp_path)
    header(tmp_path, change)
    with pytest.raises(UserError, match=r"model\.safetensors") as error:
        read_header(tmp_path / "model.safetensors")
    assert message in str(error.value)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    from megatron_llmjp.convert.cli import main

    root = tmp_path_factory.mktemp("damage")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    llama(rope_theta=10000.0, **sizes).save_pretrained(root / "hf")
    targets = {
        "dist": ["megatron-lm"],
        "legacy": ["megatron-lm", "--ckpt-format", "torch"],
    }
    for name, target in targets.items():
        words = ["--to", *target, "--input", str(root / "hf"), "--output", str(root / name)]
        assert main(words) == 0
    return root


@pytest.mark.parametrize("content", [[1, 2], {}, 3, torch.ones(3), {"args": 5, "model": None},
                                     {"args": None, "module": {}, "model": []}])  # fmt: skip
def test_torch_files_with_other_content(tmp_path, sources, content):
    for name, file in (("legacy", "release/mp_rank_00/model_optim_rng.pt"),
                       ("dist", "release/common.pt")):  # fmt: skip
        shutil.copytree(sources / name, tmp_path / name)
        torch.save(content, tmp_path / name / file)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            plan_conversion("megatron-lm", "native", tmp_path / name, ConversionOptions())
    shutil.copytree(FIXTURE, tmp_path / "mds")
    torch.save(content, next((tmp_path / "mds").glob("*/mp_rank_00_model_states.pt")))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "mds"))):
        plan_conversion("megatron-deepspeed", "native", tmp_path / "mds", ConversionOptions())


def test_outputs_inside_the_source_are_refused(tmp_path, convert, monkeypatch):
    llama().save_pretrained(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    for output in (tmp_path / "hf" / "o", tmp_path / "hf", tmp_path / "link",
                   tmp_path / "link" / "o", tmp_path / "a" / ".." / "hf" / "o"):  # fmt: skip
        words = ("--to", "native", "--input", tmp_path / "hf", "--output", output)
        assert "--output" in convert(*words, code=2)
    monkeypatch.chdir(tmp_path / "hf")
    assert "--output" in convert("--to", "native", "--input", ".", "--output", ".", code=2)
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["native", "hf", "megatron-lm", "megatron-deepspeed"])
def test_invalid_parallel_sizes_are_refused_for_every_target(tmp_path, convert, target):
    gpt2().save_pretrained(tmp_path / "hf")
    words = ("--to", target, "--input", tmp_path / "hf", "--output", tmp_path / "o")
    text = convert(*words, "--target-tensor-parallel-size", "3", code=2)
    assert "num_attention_heads 4 is not divisible by tensor parallel size 3" in text
    text = convert(*words, "--target-pipeline-parallel-size", "8", code=2)
    assert "num_layers 3 is not divisible" in text or "8 exceeds num_layers 3" in text


def test_gpt2_without_the_prefix_of_keys(tmp_path, convert):
    from safetensors.torch import save_file

    gpt2().save_pretrained(tmp_path / "hf")
    tensors = {k.removeprefix("transformer."): v for k, v in state(tmp_path / "hf").items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    convert("--to", "hf", "--verify", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    assert "transformer.wte.weight" in state(tmp_path / "back")
