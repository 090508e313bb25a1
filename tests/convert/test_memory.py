"""Memory use, and interrupted and killed conversions."""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.safetensors import plan_safetensors
from megatron_llmjp.convert.formats.hugging_face.architectures import llama
from megatron_llmjp.convert.tensors import part_shapes, tensor_shapes
from tests.support.timeouts import PROCESS_TIMEOUT, wait_until

MODEL = ModelConfig(
    num_layers=10, hidden_size=1024, num_attention_heads=16, num_query_groups=8,
    ffn_hidden_size=2816, max_position_embeddings=2048, vocab_size=16384,
)  # fmt: skip
LARGEST = 2 * 16384 * 1024  # bytes of the embedding in bf16


@pytest.fixture
def model(tmp_path) -> Path:
    """Write a model of 0.3 GB, all zeros."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shape_of = tensor_shapes(MODEL, 16384)
    tensors = {
        key: (shape, DType.bfloat16)
        for rule in llama.ARCHITECTURE.expanded_rules(MODEL)
        for key, shape in zip(rule.keys, part_shapes(rule.layout, shape_of[rule.name]), strict=True)
    }
    plan_safetensors("model.safetensors", tensors).create(folder)
    config = {"model_type": "llama", "vocab_size": 16384, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | llama.ARCHITECTURE.to_config(MODEL)))
    return folder


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_llmjp.convert.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def peak(process: subprocess.Popen[bytes]) -> int:
    """Wait for success; return the peak resident memory in bytes."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_memory_is_proportional_to_the_largest_tensor(tmp_path, model):
    begin = peak(start("--to", "native", "--input", model, "--output", tmp_path / "x", "--dry-run"))
    native = peak(start("--to", "native", "--input", model, "--output", tmp_path / "native"))
    back = peak(start("--to", "megatron-deepspeed", "--target-tensor-parallel-size", 4,
                      "--input", tmp_path / "native", "--output", tmp_path / "mds"))  # fmt: skip
    size = (model / "model.safetensors").stat().st_size
    assert size > 8 * LARGEST
    assert max(native, back) < begin + 3 * LARGEST + 50_000_000


@pytest.mark.long
def test_memory_of_a_comparison_and_an_average(tmp_path, model):
    words = "--to", "native", "--input", model, "--output", tmp_path / "native"
    begin = peak(start(*words, "--dry-run"))
    assert peak(start(*words))
    two = model, tmp_path / "native"
    compared = peak(start("inspect", *two))
    averaged = peak(start("--to", "hf", "--average", *two, "--output", tmp_path / "mean"))
    assert compared < begin + 2 * LARGEST + 50_000_000
    assert averaged < begin + 5 * LARGEST + 50_000_000  # and the sum in fp32


def test_interrupted_conversion_removes_its_output(tmp_path, model):
    process = start("--to", "native", "--input", model, "--output", tmp_path / "native")
    partial = tmp_path / ".native.partial"
    wait_until(lambda: list(partial.glob("*/*.distcp")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PROCESS_TIMEOUT) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    partial.mkdir()  # as left by a killed conversion
    (partial / "rubbish").write_text("x")
    assert start("--to", "native", "--input", model, "--output", tmp_path / "native").wait() == 0
    assert not partial.exists()
    assert not list((tmp_path / "native").rglob("rubbish"))


def test_killed_conversion_can_be_repeated(tmp_path, model):
    """Send SIGKILL during the copies; repeating the command gives the usual output."""
    with (model / "model.safetensors").open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header)
        file.write(random.Random(5).randbytes(60_000_000))  # missing bytes would be equal to zeros
    words = ("--to", "native", "--input", model, "--output")
    process = start(*words, tmp_path / "killed")
    partial = tmp_path / ".killed.partial"
    wait_until(lambda: written(partial) or process.poll() is not None, 0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert partial.exists()
    assert start(*words, tmp_path / "killed").wait() == 0
    assert start(*words, tmp_path / "undisturbed").wait() == 0
    names = [
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "killed", tmp_path / "undisturbed")
    ]
    assert names[0] == names[1]
    for name in names[0]:
        same = filecmp.cmp(tmp_path / "killed" / name, tmp_path / "undisturbed" / name, False)
        assert same, name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "killed", "undisturbed"]


def written(folder: Path) -> bool:
    """Return whether a tensor was copied: files are sparse first."""
    return any(path.stat().st_blocks * 512 > 5_000_000 for path in folder.glob("*/*.distcp"))
