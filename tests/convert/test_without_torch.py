"""Conversions that change no type, in a process that cannot import torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from tests.convert.hf_models import llama

PROGRAM = """
import sys

SLOW = {"torch", "transformers", "megatron", "huggingface_hub", "safetensors", "deepspeed"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in SLOW, name

sys.meta_path.insert(0, Refuse())
from megatron_llmjp.convert.cli import main
from megatron_llmjp.convert.copying import contiguous_runs

contiguous_runs.MIN_RUN_BYTES = 1  # runs of real models are longer than those of a small one
for line in sys.stdin.read().splitlines():
    assert main(line.split()) == 0, line
"""
TENSOR_PARALLEL = "--target-tensor-parallel-size 2"
DIRECTIONS = [
    "--to native --input hf --output native",
    "--to hf --input native --output hf-native",
    f"--to megatron-lm {TENSOR_PARALLEL} --input native --output dist",
    "--to native --input dist --output native-dist",
    f"--to megatron-lm --ckpt-format torch {TENSOR_PARALLEL} --input native --output legacy",
    "--to native --input legacy --output native-legacy",
    "--to hf --input native-legacy --output hf-legacy",
    f"--to megatron-deepspeed {TENSOR_PARALLEL} --input native-dist --output deepspeed",
    "--to hf --input deepspeed --output hf-deepspeed",
    f"--to megatron-deepspeed {TENSOR_PARALLEL} --no-pipeline --input hf --output modules",
    "--to native --input modules --output native-modules",
    "--to hf --input native-modules --output hf-modules",
]


def test_no_direction_imports_torch(tmp_path):
    llama(rope_theta=10000.0, num_key_value_heads=4).save_pretrained(tmp_path / "hf")
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{PROGRAM}"],
        input="\n".join(DIRECTIONS),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    before = load_file(tmp_path / "hf" / "model.safetensors")
    for name in ("hf-native", "hf-legacy", "hf-deepspeed", "hf-modules"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_metadata_is_that_of_torch(tmp_path):
    """Byte for byte, up to the version of torch that the tests use."""
    writer = TorchDistWriter(10_000, ".")
    writer.add_tensor("a", (3, 4), DType.bfloat16)
    writer.add_tensor("a.b", (5,), DType.float32, ((0, 2),))
    writer.add_tensor("a.b", (5,), DType.float32, ((1, 2),))
    writer.add_object("c/shard_0_1", [None])
    writer.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (3, 4)}}
    for file in writer.files:
        file.create(tmp_path)
    writer.finish(tmp_path, {})

    def entry(dtype: torch.dtype, size: list[int], chunks: list[tuple[list[int], list[int]]]):
        places = [dcp.ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
        properties = dcp.TensorProperties(dtype=dtype)
        return dcp.TensorStorageMetadata(properties, torch.Size(size), places)

    stored = writer._storage
    name = "__0_0.distcp"
    places = {key: _StorageInfo(name, start, length) for key, (_, start, length) in stored.items()}
    expected = dcp.Metadata(
        {
            "a": entry(torch.bfloat16, [3, 4], [([0, 0], [3, 4])]),
            "a.b": entry(torch.float32, [2, 5], [([0, 0], [1, 5]), ([1, 0], [1, 5])]),
            "c/shard_0_1": dcp.BytesStorageMetadata(),
        },
        storage_data={dcp.MetadataIndex(*key): place for key, place in places.items()},
    )
    expected.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (3, 4)}}  # type: ignore[attr-defined]
    content = (tmp_path / ".metadata").read_bytes()
    assert pickle.loads(content) == expected
    assert pickle.loads(content).mcore_data == expected.mcore_data  # type: ignore[attr-defined]
    found = pickle.loads(content).storage_data
    assert [type(key).__module__ for key in found] == [dcp.__name__] * 4
