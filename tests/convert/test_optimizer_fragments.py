"""Optimizer state in fragments and buckets; checkpoints of megatron-core from 0.17 on."""

from __future__ import annotations

import argparse
import pickle
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as torch_dcp

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files import torch_archive, torch_dist
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.formats import native
from megatron_llmjp.convert.optimizer import optimizer_fragments
from megatron_llmjp.convert.plan import Slot, write_slot
from megatron_llmjp.convert.tensors import tensor_shapes
from megatron_llmjp.errors import UserError
from tests.convert.dtypes import dtype_of
from tests.convert.hf_models import llama, state
from tests.convert.megatron_parts import FUSED, renamed
from tests.support.witness import read_state

FIXTURES = Path(__file__).parent / "fixtures"
MOMENTS = FIXTURES / "mds_gpt_tp2pp2dp2_bf16z1" / "ckpt"
WRITTEN = ("mlm_fully_sharded_model_space", "mlm_dp_reshardable")
"""Written by LLM-jp's fork of Megatron-LM (core 0.12), and by Megatron-LM (core 0.20)."""


@pytest.mark.parametrize("name", WRITTEN)
def test_checkpoints_of_these_programs(tmp_path, convert, name):
    """Weights, fp32 weights and both moments are equal to those of the ranks, bit for bit."""
    words = ("--with-optimizer", "--target-tensor-parallel-size", "2", "--verify")
    shutil.copytree(FIXTURES / name, tmp_path / name)
    if name == "mlm_dp_reshardable":  # empty with NullTokenizer, and so not in the repository
        (tmp_path / name / "iter_0000003" / "tokenizer").mkdir(exist_ok=True)
    convert("--to", "native", *words, "--input", tmp_path / name, "--output", tmp_path / "n")
    source = native.read_native(tmp_path / "n")
    state = source.optimizer()
    found = {
        (kind, renamed(name, FUSED)): tensor
        for kind in ("weight", *state.tensors)
        for name, tensor in read_state(source.path, kind).items()
    }
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        expected = {tuple(key.split(" ")): torch.from_numpy(arrays[key]) for key in arrays}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].float(), expected[key]) for key in expected)
    assert (source.iteration, state.step, state.scheduler["num_steps"]) == (3, 3, 24)
    assert source.model.vocab_size == {"mlm_fully_sharded_model_space": 25}.get(name, 24)


def test_other_bucket_layouts_are_refused(tmp_path, convert):
    """The order of a rank's parameters is not stored: other layouts must be refused."""
    source = FIXTURES / "mlm_dp_reshardable"
    words = ("--to", "native", "--with-optimizer", "--output", tmp_path / "n", "--input")
    with mock.patch.dict(optimizer_fragments._ORDERS, clear=True):
        common = optimizer_fragments._COMMON_ORDER[::-1]
        order = ("input_layernorm", *common, "self_attention.linear_proj")
        optimizer_fragments._ORDERS["other"] = order
        text = convert(*words, source, code=2)
    assert "no known order of parameters" in text
    assert "--dist-ckpt-optim-fully-reshardable" in text
    with mock.patch.object(optimizer_fragments, "_equal_norms_and_biases", return_value=False):
        assert "no known order of parameters" in convert(*words, source, code=2)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("size", "number", "message"),
    [
        ("tensor", 1, "the buckets are not those of TP 1 x PP 1"),
        ("pipeline", 2, "1 layers cannot be split over 2 stages"),
    ],
)
def test_buckets_of_another_layout_are_refused(tmp_path, convert, size, number, message):
    """The fixture has one layer and two buckets, of TP 2; its arguments must say so."""
    read = optimizer_fragments._read_kind

    def read_with_other_arguments(*arguments):
        setattr(arguments[4], f"{size}_model_parallel_size", number)
        return read(*arguments)

    words = ("--to", "native", "--with-optimizer", "--output", tmp_path / "n", "--input")
    with mock.patch.object(optimizer_fragments, "_read_kind", read_with_other_arguments):
        text = convert(*words, FIXTURES / "mlm_dp_reshardable", code=2)
    assert message in text


GROUPS = {"param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize("stored", [GROUPS, [GROUPS], [], {}, 3, [3], [GROUPS, GROUPS]])
def test_stored_parameter_groups(tmp_path, stored):
    """Those of one optimizer; with several, it is not known which parameters each of them has."""
    with mock.patch.object(torch_dist, "read_object", return_value=stored):
        if stored in (GROUPS, [GROUPS]):
            found = optimizer_fragments.read_param_groups(tmp_path)
            assert found == GROUPS["param_groups"]
            return
        with pytest.raises(UserError, match="its parameter groups are missing"):
            optimizer_fragments.read_param_groups(tmp_path)


MODULES = (
    "input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv",
    "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
"""Modules of a layer in the order in which megatron-core's local implementation registers them."""


@pytest.mark.parametrize(
    "layers",
    [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0], [1, 2, 3]], [[], [0, 1], [2], [3]]],
)
def test_buckets_of_pipeline_stages(tmp_path, layers):
    """Two stages, with one or two chunks each: stage, other stage, stage, other stage."""
    model = ModelConfig(
        num_layers=4, hidden_size=8, num_attention_heads=2, ffn_hidden_size=12,
        activation_function="gelu", normalization="LayerNorm", add_bias_linear=True,
        position_embedding_type="learned_absolute", max_position_embeddings=6,
        untie_embeddings_and_output_weights=False,
    )  # fmt: skip
    shapes = tensor_shapes(model, 10)
    generator = torch.Generator().manual_seed(3)
    wholes = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inner = [f"{module}.{kind}" for module in MODULES for kind in ("weight", "bias")]
    parts = [[f"decoder.layers.{i}.{name}" for i in own for name in inner] for own in layers]
    embedding = "embedding.word_embeddings.weight"
    parts[0] = [embedding, "embedding.position_embeddings.weight", *parts[0]]
    final = [f"decoder.final_layernorm.{kind}" for kind in ("weight", "bias")]
    parts[-1] = [*parts[-1], *final, embedding]  # the last stage has a copy
    buckets = {(n % 2, n // 2): [bucket_of(tmp_path, wholes, part)] for n, part in enumerate(parts)}
    layout = "E" + "|".join("t" * len(own) for own in layers) + "L"
    args = argparse.Namespace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2 if len(layers) == 4 else None,
        # as megatron-core's object, which becomes an inert one
        pipeline_model_parallel_layout=argparse.Namespace(input_data=layout),
    )
    order = optimizer_fragments._ORDERS["local"]
    found = optimizer_fragments._read_kind(model, 10, buckets, order, args, tmp_path)
    assert found is not None and found.keys() == wholes.keys()
    assert all(torch.equal(read.read(name), wholes[name]) for name, read in found.items())


def bucket_of(root: Path, wholes: dict[str, torch.Tensor], names: list[str]):
    """Write a buffer: parameters in reverse order, each from a multiple of 64 elements."""
    writer, end = TorchDistWriter(1 << 30, "."), 0
    slots: list[tuple[int, Slot, torch.Tensor]] = []
    for name in reversed(names):
        start, flat = (end + 63) // 64 * 64, wholes[name].flatten()
        [(_, slot)] = writer.add_tensor(f"{name} {start}", tuple(flat.shape), dtype_of(flat))
        slots.append((start, slot, flat))
        end = start + flat.numel()
    (output,) = writer.files
    output.create(root)
    file = root / f"{len(list(root.iterdir()))}.distcp"
    for _, slot, flat in slots:
        write_slot(root, slot, flat)
    (root / "__0_0.distcp").rename(file)
    chunks = {}
    for (start, _, flat), (_, offset, length) in zip(slots, writer._storage.values(), strict=True):
        chunks[(start,), (flat.numel(),)] = (file, offset, length)
    return torch_dist.TensorEntry((end,), DType.float32, chunks)


def test_signals_in_arguments_are_inert(tmp_path):
    args = argparse.Namespace(exit_signal=signal.SIGTERM, num_layers=2)
    torch.save({"args": args}, tmp_path / "a.pt")
    found = torch_archive.load_archive(tmp_path / "a.pt")["args"]
    assert found.num_layers == 2
    assert isinstance(found.exit_signal, torch_archive.InertObject)


def test_attributes_of_tensors_are_ignored(tmp_path):
    """Megatron-LM sets attributes on the fp32 main weights of its plain optimizer."""
    tensor = torch.arange(6.0).view(2, 3)
    tensor.tensor_model_parallel = True
    torch.save({"master": tensor}, tmp_path / "a.pt")
    found = torch_archive.load_archive(tmp_path / "a.pt")["master"]
    assert torch.equal(found.read(), tensor)


def test_common_state_inside_the_distributed_checkpoint(tmp_path, convert):
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", "--input", tmp_path / "hf", "--output", tmp_path / "mlm")
    folder = tmp_path / "mlm" / "release"
    common = folder / "common.pt"
    with (folder / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    key = "common_state/shard_0_1"
    metadata.state_dict_metadata[key] = torch_dcp.BytesStorageMetadata()
    shutil.copy(common, folder / "__9_0.distcp")
    place = _StorageInfo("__9_0.distcp", 0, common.stat().st_size)
    metadata.storage_data[torch_dcp.MetadataIndex(key)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    common.unlink()
    convert("--to", "hf", "--input", tmp_path / "mlm", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_moments_in_flat_fragments(tmp_path, convert):
    """Fragments of tensor parallel size 2, each in two pieces that end within a row."""
    convert("--to", "native", "--with-optimizer", "--input", MOMENTS, "--output", tmp_path / "n")
    source = native.read_native(tmp_path / "n")
    folder = source.path
    stored = torch_dist.read_metadata(folder)
    expected = {
        (kind, name): read.read(name)
        for kind, reads in source.optimizer().tensors.items()
        for name, read in reads.items()
    }
    entries = {}
    for number, (key, entry) in enumerate(stored.items()):
        if key.startswith("optimizer.state."):
            entries[key] = flattened(tmp_path, f"__{number}.distcp", key, entry)
    again = native._optimizer(source.model, {**stored, **entries}, folder)
    found = {
        (kind, name): read.read(name)
        for kind, reads in again.tensors.items()
        for name, read in reads.items()
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def flattened(
    root: Path, file: str, key: str, entry: torch_dist.TensorEntry
) -> torch_dist.TensorEntry:
    """Write an entry as pieces ``[layers, grid..., elements]`` to another file."""
    stacked = "layers." in key
    layers = [
        entry.tensor_read((i,) if stacked else ()) for i in range(entry.shape[0] if stacked else 1)
    ]
    wholes = [layer.read(key) for layer in layers]
    shape = wholes[0].shape
    grid = tuple(2 if axis == len(shape) - 1 and n % 2 == 0 else 1 for axis, n in enumerate(shape))
    writer = TorchDistWriter(1 << 30, ".")
    slots: list[tuple[Slot, torch.Tensor]] = []
    chunks = {}
    places = {}
    for i, whole in enumerate(wholes):
        for cell, part in enumerate(whole.chunk(grid[-1], dim=-1)):
            flat = part.flatten()
            for start, piece in ((0, flat[:5]), (5, flat[5:])):
                name = f"{key} {i} {cell} {start}"
                [(_, slot)] = writer.add_tensor(name, tuple(piece.shape), dtype_of(piece))
                slots.append((slot, piece))
                lead = (i,) if stacked else ()
                where = (*lead, *([0] * (len(shape) - 1)), cell, start)
                chunks[where, (*([1] * (len(where) - 1)), piece.numel())] = name
    for output in writer.files:
        output.create(root)
    for slot, piece in slots:
        write_slot(root, slot, piece)
    (root / "__0_0.distcp").rename(root / file)
    for (name, _, _), (_, offset, length) in writer._storage.items():
        places[name] = (root / file, offset, length)
    size = (*((len(wholes),) if stacked else ()), *grid, wholes[0].numel() // grid[-1])
    return torch_dist.TensorEntry(
        size, entry.dtype, {box: places[name] for box, name in chunks.items()}
    )


def test_vocab_size_trims_for_null_tokenizers_only(tmp_path, convert):
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    text = convert("--to", "megatron-lm", "--ckpt-format", "torch", "--input", tmp_path / "hf",
                   "--output", tmp_path / "mlm")  # fmt: skip
    assert "27 padding rows were added to 101" in text
    path = next(tmp_path.glob("mlm/*/*/*.pt"))
    content = torch.load(path, weights_only=False)
    del content["args"].true_vocab_size
    content["args"].vocab_size = 100
    for kind, rows in (("NullTokenizer", 101), ("SentencePieceTokenizer", 128)):
        content["args"].tokenizer_type = kind
        torch.save(content, path)
        out = tmp_path / kind
        text = convert("--to", "hf", "--input", tmp_path / "mlm", "--output", out)
        assert state(out)["model.embed_tokens.weight"].shape[0] == rows
        assert ("rows 101 to 127 of 128 are padding and were removed" in text) == (rows == 101)
        assert ("true vocabulary size is not in the checkpoint" in text) == (rows == 128)
