"""Optimizer state, counters and random states that are written for Megatron-LM.

Compared with the files that LLM-jp's fork of Megatron-LM wrote (core 0.12.1), and with
megatron-core's own functions.
"""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_llmjp.checkpoint.sharded_state import get_random_state
from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.optimizer.random_states import read_native_states
from tests.support.processes import ROOT
from tests.support.witness import read_state, read_tensors

FIXTURES = Path(__file__).parent / "fixtures"
REAL = FIXTURES / "mlm_fully_sharded_model_space"
CURVE = ROOT / "tests" / "parity" / "fixtures" / "llama_small"
STEP = "iter_0000003"
SHARDED, RESHARDABLE = "fully_sharded_model_space", "fully_reshardable"
COUNTERS = ("consumed_train_samples", "vocab_size", "padded_vocab_size", "tokenizer_type",
            "seq_length", "max_position_embeddings", "tensor_model_parallel_size",
            "pipeline_model_parallel_size", "use_distributed_optimizer",
            "ckpt_fully_parallel_save", "bf16", "num_layers", "hidden_size")  # fmt: skip


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The real checkpoint as a native one."""
    from megatron_llmjp.convert.cli import main

    folder = tmp_path_factory.mktemp("native") / "n"
    words = ["--to", "native", "--with-optimizer", "--input", REAL, "--output", folder]
    words += ["--target-tensor-parallel-size", 2]  # keeps the padding rows
    assert main([str(word) for word in words]) == 0
    return folder


def common_state(folder: Path):
    return torch.load(folder / "common.pt", weights_only=False)


def test_fragments_are_those_of_megatron_lm(tmp_path, convert, native):
    """TP 2: all tensors, their shapes and megatron-core's metadata are those of its own file."""
    text = convert("--to", "megatron-lm", "--with-optimizer", "--input", native,
                   "--output", tmp_path / "m", "--target-tensor-parallel-size", 2)  # fmt: skip
    assert "random states were not written (the source has none)" in text
    before, after = REAL / STEP, tmp_path / "m" / STEP
    metadata = [FileSystemReader(folder).read_metadata() for folder in (before, after)]
    real, ours = (
        {k: v.size for k, v in m.state_dict_metadata.items() if hasattr(v, "size")}
        for m in metadata
    )
    assert ours == real
    shapes = [{k: v for k, v in m.mcore_data.items() if v} for m in metadata]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 3 * (len(real) - len(shapes[0]))
    expected, found = read_tensors(before), read_tensors(after)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    theirs, written = common_state(before), common_state(after)
    for key in ("iteration", "checkpoint_version", "opt_param_scheduler"):
        assert written[key] == theirs[key]
    assert written["optimizer"]["param_state_sharding_type"] == SHARDED
    groups = [state["optimizer"]["optimizer"]["param_groups"] for state in (theirs, written)]
    for group, other in zip(*groups, strict=True):
        assert {key: other[key] for key in group} == group
    for name in COUNTERS:
        assert getattr(written["args"], name) == getattr(theirs["args"], name), name
    assert written["args"].consumed_train_samples == 24 and written["args"].no_save_rng
    convert("--to", "native", "--with-optimizer", "--input", tmp_path / "m", "--output",
            tmp_path / "again", "--target-tensor-parallel-size", 2)  # fmt: skip
    for kind in ("weight", "exp_avg", "exp_avg_sq", "param"):
        first, second = (read_state(f / STEP, kind) for f in (native, tmp_path / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tensor", [1, 2])
def test_fp32_models_have_main_weights(tmp_path, convert, tensor):
    """The distributed optimizer stores fp32 weights of fp32 models, too: equal to the model's."""
    convert("--to", "megatron-lm", "--with-optimizer", "--input", CURVE / "iter_0000010",
            "--output", tmp_path / "m", "--target-tensor-parallel-size", tensor)  # fmt: skip
    found = read_tensors(tmp_path / "m" / "iter_0000010")
    real = torch.load(CURVE / "iter_0000010/mp_rank_00/model_optim_rng.pt", weights_only=False)
    fc1 = [real["model"][f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(4)]
    gate_up = torch.stack([w.view(2 * tensor, 1, -1) for w in fc1])
    assert torch.equal(found["optimizer.state.fp32_param.decoder.layers.mlp.linear_fc1.weight"],
                       gate_up)  # fmt: skip
    assert torch.equal(found["decoder.layers.mlp.linear_fc1.weight"], torch.stack(fc1))
    proj = [
        real["model"][f"decoder.layers.{i}.self_attention.linear_proj.weight"] for i in range(4)
    ]
    columns = torch.stack([torch.stack(w.chunk(tensor, 1)).flatten(1)[None] for w in proj])
    name = "decoder.layers.self_attention.linear_proj.weight"
    assert torch.equal(found[f"optimizer.state.fp32_param.{name}"], columns)
    written = common_state(tmp_path / "m" / "iter_0000010")
    assert written["args"].consumed_train_samples == 80
    assert written["args"].vocab_size == 500 == real["args"].vocab_size
    steps = [group["step"] for group in written["optimizer"]["optimizer"]["param_groups"]]
    assert steps == [10, 10]


def test_reshardable_state(tmp_path, convert, native):
    """The format of core 0.15 and newer: megatron-core finds it in the checkpoint."""
    from megatron.core.dist_checkpointing import load_content_metadata

    convert("--to", "megatron-lm", "--with-optimizer", "--input", native, "--output",
            tmp_path / "m", "--distrib-optim-sharding-type", RESHARDABLE,
            "--target-tensor-parallel-size", 2)  # fmt: skip
    folder = tmp_path / "m" / STEP
    metadata = load_content_metadata(str(folder))
    assert metadata["distrib_optim_sharding_type"] == RESHARDABLE
    for kind in ("weight", "exp_avg", "exp_avg_sq", "param"):
        expected, found = (read_state(f, kind) for f in (native / STEP, folder))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    args = common_state(folder)["args"]
    assert args.dist_ckpt_optim_fully_reshardable and not args.ckpt_fully_parallel_save


def test_other_formats_are_refused(tmp_path, convert, native):
    words = ("--to", "megatron-lm", "--with-optimizer", "--output", tmp_path / "m", "--input")
    assert "--ckpt-format torch_dist" in convert(*words, native, "--ckpt-format", "torch", code=2)
    convert("--to", "native", "--input", native, "--output", tmp_path / "weights")
    assert "omit the flag" in convert(*words, tmp_path / "weights", code=2)
    assert not (tmp_path / "m").exists()


def with_random_states(native: Path, folder: Path, data: int, cuda: int) -> list[dict]:
    """Copy a native checkpoint, and add the random states of a run of TP 2."""
    shutil.copytree(native, folder)
    states = []
    writer = TorchDistWriter(1 << 30, ".")
    for rank in range(2 * data):
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        own = torch.arange(cuda) + rank
        with mock.patch.object(torch.cuda, "get_rng_state", return_value=own.to(torch.uint8)):
            state = get_random_state()
        state["tracker"] = {"model-parallel-rng": state["cuda"] + 100}
        expected = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        states.append({**state, "expected": expected})
        t, d = divmod(rank, data)
        writer.add_object(f"rng_state/shard_0.{t}.{d}_1.2.{data}", [state])
    (folder / "rng").mkdir()
    for file in writer.files:
        file.create(folder / "rng")
    writer.finish(folder / "rng", {})
    return states


@pytest.mark.parametrize("data", [1, 2])
def test_random_states(tmp_path, monkeypatch, convert, native, data):
    """megatron-core's keys, and the values that Megatron-LM's get_rng_state stores."""
    from megatron.core.dist_checkpointing import ShardedObject

    states = with_random_states(native, tmp_path / "n", data, cuda=16)
    monkeypatch.setattr("megatron_llmjp.convert.formats.native.read_native_states",
                        lambda folder: read_native_states(folder.parent / "rng"))  # fmt: skip
    words = ("--to", "megatron-lm", "--with-optimizer", "--input", tmp_path / "n")
    text = convert(*words, "--output", tmp_path / "m", "--target-tensor-parallel-size", 2)
    assert ("--data-parallel-random-init" in text) == (data == 2)
    for rank in range(2):
        key = ShardedObject("rng_state", None, (1, 2), (0, rank)).unique_key
        place = torch_dist.read_objects(tmp_path / "m" / STEP, "rng_state")[key]
        assert len(place[0]) == data
        stored = saved_object(tmp_path / "m" / STEP, key)[0]
        for d, found in enumerate(stored):
            state = states[rank * data + d]
            python, numpy, cpu = state["expected"]
            assert found["random_rng_state"] == python
            assert all(
                np.array_equal(a, b) for a, b in zip(found["np_rng_state"], numpy, strict=True)
            )
            assert found["np_rng_state"][1].dtype == numpy[1].dtype
            assert torch.equal(found["torch_rng_state"], cpu)
            assert torch.equal(found["cuda_rng_state"], state["cuda"])
            tracker = found["rng_tracker_states"]["model-parallel-rng"]
            assert torch.equal(tracker, state["tracker"]["model-parallel-rng"])
            random.setstate(found["random_rng_state"])
            np.random.set_state(found["np_rng_state"])
    args = common_state(tmp_path / "m" / STEP)["args"]
    assert not args.no_save_rng and args.data_parallel_random_init == (data == 2)
    text = convert(*words, "--output", tmp_path / "other")
    assert "the source has those of TP 2 x PP 1, not TP 1 x PP 1" in text
    assert not torch_dist.read_objects(tmp_path / "other" / STEP, "rng_state")


def saved_object(folder: Path, key: str):
    """Read an object as PyTorch's planner does."""
    storage = FileSystemReader(folder).read_metadata().storage_data
    place = next(info for index, info in storage.items() if index.fqn == key)
    with (folder / place.relative_path).open("rb") as stream:
        stream.seek(place.offset)
        data = stream.read(place.length)
    return torch.load(io.BytesIO(data), weights_only=False)


def test_random_states_of_a_cpu(tmp_path, monkeypatch, convert, native):
    """They do not load on a GPU."""
    with_random_states(native, tmp_path / "n", 1, cuda=5056)
    monkeypatch.setattr("megatron_llmjp.convert.formats.native.read_native_states",
                        lambda folder: read_native_states(folder.parent / "rng"))  # fmt: skip
    text = convert("--to", "megatron-lm", "--with-optimizer", "--input", tmp_path / "n",
                   "--output", tmp_path / "m", "--target-tensor-parallel-size", 2)  # fmt: skip
    assert "the source has those of a CPU" in text and "--no-load-rng" in text
