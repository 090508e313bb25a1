"""Pipeline layouts of written checkpoints: uneven, virtual and standalone stages.

Each rank's file is compared with tensors cut from transformers' models; the division of the layers
is compared with megatron-core's and DeepSpeed's own functions.
"""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_llmjp.config.model_config import ParallelConfig
from megatron_llmjp.config.pipeline_layout import split_layers, virtual_pipeline_size
from megatron_llmjp.convert.formats.megatron_deepspeed.stages import stage_layers
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import MODELS, state
from tests.convert.megatron_parts import FUSED, rank_parts, renamed, whole_tensors

LAYOUTS = {
    # flags: layers of each chunk of each stage, fields of args
    "--target-pipeline-parallel-size 3 --decoder-first-pipeline-num-layers 1 "
    "--decoder-last-pipeline-num-layers 2": (
        [[[0]], [[1, 2, 3]], [[4, 5]]],
        {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2},
    ),
    "--target-pipeline-parallel-size 2 --decoder-last-pipeline-num-layers 2 "
    "--num-virtual-stages-per-pipeline-rank 2": (
        [[[0, 1], [3, 4]], [[2], [5]]],
        {"decoder_last_pipeline_num_layers": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "--target-pipeline-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3": (
        [[[0], [2], [4]], [[1], [3], [5]]],
        {"virtual_pipeline_model_parallel_size": 3},
    ),
    "--target-pipeline-parallel-size 2 --account-for-embedding-in-pipeline-split "
    "--account-for-loss-in-pipeline-split --num-virtual-stages-per-pipeline-rank 2": (
        [[[0], [3, 4]], [[1, 2], [5]]],
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    # a stage with the embedding alone, and one with the loss alone
    "--target-pipeline-parallel-size 8 --account-for-embedding-in-pipeline-split "
    "--account-for-loss-in-pipeline-split": (
        [[[]], [[0]], [[1]], [[2]], [[3]], [[4]], [[5]], [[]]],
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "--target-pipeline-parallel-size 2 --pipeline-model-parallel-layout E|t*4|tt|L": (
        [[[], [4, 5]], [[0, 1, 2, 3], []]],
        {
            "pipeline_model_parallel_layout": "E|t*4|tt|L",
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
}
DEFAULTS = {
    "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None, "virtual_pipeline_model_parallel_size": None,
    "tensor_model_parallel_size": 2,
}  # fmt: skip
DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer"}


@pytest.mark.parametrize("flags", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_files_of_all_ranks(tmp_path, convert, architecture, flags):
    stages, fields = LAYOUTS[flags]
    changes = {"rope_theta": 10000.0} if architecture == "llama" else {}
    model = MODELS[architecture](**{DEPTH[architecture]: 6}, **changes)
    model.save_pretrained(tmp_path / "hf")
    words = ["--to", "megatron-lm", "--ckpt-format", "torch", "--input", tmp_path / "hf"]
    words += ["--output", tmp_path / "there", "--target-tensor-parallel-size", 2, *flags.split()]
    assert "mp_rank_01" in convert(*words, "--dry-run") and not (tmp_path / "there").exists()
    convert(*words, "--verify")
    for rank in range(2):
        for stage, chunks in enumerate(stages):
            path = tmp_path / "there" / "release" / f"mp_rank_{rank:02d}_{stage:03d}"
            content = torch.load(path / "model_optim_rng.pt", weights_only=False)
            assert vars(content["args"]).items() >= {**DEFAULTS, **fields}.items()
            assert content["args"].pipeline_model_parallel_size == len(stages)
            names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
            assert [key for key in content if key.startswith("model")] == names
            for number, name in enumerate(names):
                place = number * len(stages) + stage
                last = len(stages) * len(chunks) - 1
                expected = chunk_parts(model, rank, chunks[number], place == 0, place == last)
                assert_equal_tensors(content[name], expected)
    text = convert("inspect", tmp_path / "there")
    assert f"torch, TP 2 x PP {len(stages)}" in text
    assert ("x VP" in text) == (len(stages[0]) > 1)
    convert("--to", "hf", "--input", tmp_path / "there", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def chunk_parts(model, rank: int, layers: list[int], first: bool, last: bool):
    """Return the tensors of a model chunk on one tensor-parallel rank."""
    found = {}
    swiglu = model.config.model_type == "llama"
    for name, whole in whole_tensors(model, padded=256):
        part = rank_parts(name, whole, 2, swiglu)[rank]
        if name.startswith("decoder.layers."):
            number, inner = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) in layers:
                found[f"decoder.layers.{layers.index(int(number))}.{inner}"] = part
        elif first if name.startswith("embedding.") else last:
            found[name] = part
        if name == "embedding.word_embeddings.weight" and last and not swiglu:
            found["output_layer.weight"] = part  # the tied copy
    return found


def assert_equal_tensors(found, expected) -> None:
    tensors = {renamed(key, FUSED): t for key, t in found.items() if torch.is_tensor(t)}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


SPLITS = [
    (8, {"pipeline_model_parallel_size": 4}),
    (12, {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}),
    (
        14,
        {
            "pipeline_model_parallel_size": 4,
            "decoder_first_pipeline_num_layers": 4,
            "decoder_last_pipeline_num_layers": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    (7, {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 1}),
    (
        14,
        {
            "pipeline_model_parallel_size": 4,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    (2, {"pipeline_model_parallel_size": 3, "account_for_loss_in_pipeline_split": True}),
]


@pytest.mark.parametrize(("layers", "fields"), SPLITS)
def test_megatron_core_divides_the_layers_alike(layers, fields):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    parallel = ParallelConfig(**fields)
    chunks = virtual_pipeline_size(parallel)
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
    )
    for rank, stage in enumerate(split_layers(parallel, layers)):
        for number, chunk in enumerate(stage):
            place = {"vp_stage": number if chunks > 1 else None, "pp_rank": rank}
            assert chunk.layers == get_num_layers_to_build(config, **place)
            assert chunk.first_layer == get_transformer_layer_offset(config, **place)


def test_deepspeed_divides_the_layers_alike():
    """In equal stages; where its versions differ, the optimizer's files cannot be written."""
    from deepspeed.runtime.utils import partition_balanced

    refused = 0
    for layers in range(1, 25):
        for stages in range(1, min(layers, 9) + 1):
            modules = [0, 0] + [1] * layers + [0, 0, 0]  # cast, embedding, ..., norm, head, cast
            bounds = partition_balanced(modules, stages)
            ranges = [range(max(0, a - 2), min(layers, b - 2)) for a, b in pairwise(bounds)]
            try:
                assert stage_layers(layers, stages) == ranges
            except UserError as error:
                assert layers % stages and "versions of DeepSpeed divide" in str(error)
                refused += 1
    assert refused


REFUSED = {
    ("hf", "--account-for-loss-in-pipeline-split"): "checkpoints load with any pipeline stages",
    ("native", "--pipeline-model-parallel-layout EttL"): "--pipeline-model-parallel-layout: native",
    ("megatron-deepspeed", "--num-virtual-stages-per-pipeline-rank 3"): "has no virtual stages",
    ("megatron-deepspeed", "--decoder-first-pipeline-num-layers 1"): "partition_method",
    ("megatron-deepspeed", "--target-pipeline-parallel-size 4"): "exceeds num_layers 3",
    (
        "megatron-deepspeed",
        "--target-pipeline-parallel-size 2 --no-pipeline",
    ): "cannot be combined",
    ("megatron-lm", "--target-pipeline-parallel-size 2"): "num_layers 3 is not divisible",
    ("megatron-lm", "--num-virtual-stages-per-pipeline-rank 3"): "require a pipeline parallel size",
    (
        "megatron-lm",
        "--target-pipeline-parallel-size 2 --pipeline-model-parallel-layout Et|tL",
    ): "it has 2 layers (t), the model 3",
    (
        "megatron-lm",
        "--target-pipeline-parallel-size 2 --pipeline-model-parallel-layout E|ttt|L",
    ): "it has 3 stages for 2 processes",
    (
        "megatron-lm",
        "--target-pipeline-parallel-size 3 --decoder-first-pipeline-num-layers 1 "
        "--account-for-loss-in-pipeline-split",
    ): "pipeline stages can be set in one way only",
}


@pytest.mark.parametrize(("target", "flags"), REFUSED)
def test_layouts_that_a_format_does_not_have(tmp_path, convert, target, flags):
    MODELS["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    words = ("--to", target, "--input", tmp_path / "hf", "--output", tmp_path / "there")
    assert REFUSED[target, flags] in convert(*words, *shlex.split(flags), code=2)
    assert not (tmp_path / "there").exists()


def test_uneven_stages_of_deepspeed(tmp_path, convert):
    """Layer files do not depend on the stages; the optimizer's files are those of 2 + 1 layers."""
    MODELS["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    words = ("--to", "megatron-deepspeed", "--input", tmp_path / "hf")
    convert(*words, "--output", tmp_path / "there", "--target-pipeline-parallel-size", 2,
            "--with-optimizer")  # fmt: skip
    step = tmp_path / "there" / "global_step0"
    ranks = [torch.load(path, weights_only=False) for path in sorted(step.glob("mp_rank_*"))]
    numbers = [
        sorted({name.split(".")[0] for group in rank["param_shapes"] for name in group}, key=int)
        for rank in ranks
    ]
    assert numbers == [["1", "2", "3"], ["4", "5", "6"]]
    assert [rank["args"].pipeline_model_parallel_size for rank in ranks] == [2, 2]
    convert("--to", "hf", "--input", tmp_path / "there", "--main-weights",
            "--output", tmp_path / "back")  # fmt: skip
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_paths_are_those_of_megatron(tmp_path: Path, convert):
    """One stage has no number, as in Megatron-LM's get_checkpoint_name."""
    MODELS["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", "--ckpt-format", "torch", "--input", tmp_path / "hf",
            "--output", tmp_path / "there")  # fmt: skip
    assert (tmp_path / "there/release/mp_rank_00/model_optim_rng.pt").is_file()
