"""Conversion from and to Megatron-LM and Megatron-DeepSpeed."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.rank_files import target_padded_vocab_size
from tests.convert.hf_models import MODELS, state
from tests.convert.megatron_parts import FUSED, OLD, assert_parts_of, renamed
from tests.support.tolerances import LOSS, assert_close

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCES = ["mds_gpt_tp2pp2dp2_bf16z1", "mds_llama_tp2pp2_fp32", "mds_gpt_nopipe_tp2"]


def loss_of(folder: Path, tokens: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("name", REFERENCES)
def test_real_checkpoints_reproduce_their_recorded_losses(tmp_path, convert, name):
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    tokens = torch.from_numpy(np.load(FIXTURES / name / "tokens.npy"))
    source = FIXTURES / name / "ckpt"
    convert("--to", "hf", "--input", source, "--output", tmp_path / "true")
    convert("--to", "hf", "--input", source, "--output", tmp_path / "pad", "--keep-vocab-padding")
    true, padded = expected["eval_loss_hf_true_vocab_only"], expected["eval_loss"]
    assert_close(loss_of(tmp_path / "true", tokens), true, LOSS, "true")
    assert_close(loss_of(tmp_path / "pad", tokens), padded, LOSS, "padded")


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    ("target", "tensor", "pipeline", "flags"),
    [
        ("megatron-lm", 2, 3, ["--ckpt-format", "torch"]),
        ("megatron-lm", 4, 1, ["--ckpt-format", "torch", "--transformer-impl", "local"]),
        ("megatron-lm", 2, 1, []),
        ("megatron-deepspeed", 1, 1, []),
        ("megatron-deepspeed", 4, 3, []),
        ("megatron-deepspeed", 2, 1, ["--no-pipeline"]),
    ],
)
def test_round_trip_is_exact(tmp_path, convert, architecture, target, tensor, pipeline, flags):
    if architecture == "qwen3" and target == "megatron-deepspeed":
        pytest.skip("Megatron-DeepSpeed does not normalize queries and keys")
    rope = {"rope_theta": 10000.0} if architecture in ("llama", "qwen3") else {}
    rope = {"rotary_emb_base": 10000} if architecture == "gpt_neox" else rope
    tied = {"tie_word_embeddings": tensor != 2}
    model = MODELS[architecture](**rope, **tied)
    model.save_pretrained(tmp_path / "hf")
    convert(
        "--to",
        target,
        "--input",
        tmp_path / "hf",
        "--output",
        tmp_path / "there",
        *flags,
        "--target-tensor-parallel-size",
        tensor,
        "--target-pipeline-parallel-size",
        pipeline,
    )
    (folder,) = (path for path in (tmp_path / "there").iterdir() if path.is_dir())
    in_files = 1 if (folder / ".metadata").exists() else tensor
    assert_parts_of(model, folder, in_files, padded=128 * tensor)
    convert("--to", "native", "--input", tmp_path / "there", "--output", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back")]
    ours = {key: value for key, value in configs[1].items() if key in configs[0]}
    ours = {key: value for key, value in ours.items() if not key.endswith("_token_id")}
    theirs = {key: configs[0][key] for key in ours}
    assert ours == theirs


def test_no_pipeline_names_match_a_real_checkpoint(tmp_path, convert):
    source = FIXTURES / "mds_gpt_nopipe_tp2" / "ckpt"
    convert("--to", "megatron-deepspeed", "--no-pipeline", "--input", source, "--output",
            tmp_path / "there", "--target-tensor-parallel-size", 2)  # fmt: skip
    for rank in range(2):
        name = f"global_step2/mp_rank_{rank:02d}_model_states.pt"
        real = torch.load(source / name, weights_only=False)["module"]["language_model"]
        ours = torch.load(tmp_path / "there" / name, weights_only=False)
        ours = ours["module"]["language_model"]
        assert real.keys() == ours.keys()
        assert set(real["encoder"]) == set(ours["encoder"])
        for key, value in real["encoder"].items():
            assert torch.equal(value, ours["encoder"][key])


def test_swiglu_is_split_per_rank(tmp_path, convert):
    model = MODELS["llama"](rope_theta=10000.0)
    model.save_pretrained(tmp_path / "hf")
    convert(
        "--to",
        "megatron-deepspeed",
        "--input",
        tmp_path / "hf",
        "--output",
        tmp_path / "there",
        "--target-tensor-parallel-size",
        2,
    )
    folder = tmp_path / "there" / (tmp_path / "there" / "latest").read_text()
    mlp = model.model.layers[1].mlp
    for rank in range(2):
        layer = torch.load(folder / f"layer_03-model_{rank:02d}-model_states.pt")
        half = slice(88 * rank, 88 * (rank + 1))
        expected = torch.cat([mlp.gate_proj.weight[half], mlp.up_proj.weight[half]])
        assert torch.equal(layer["mlp.dense_h_to_4h.weight"], expected)
        assert layer["self_attention.dense.weight"].shape == (64, 48)


def test_vocabulary_is_padded_for_the_target(tmp_path, convert):
    MODELS["gpt2"]().save_pretrained(tmp_path / "hf")
    for tensor, rows in ((1, 128), (4, 512)):
        out = tmp_path / f"tp{tensor}"
        convert(
            "--to",
            "megatron-deepspeed",
            "--input",
            tmp_path / "hf",
            "--output",
            out,
            "--target-tensor-parallel-size",
            tensor,
        )
        ranks = sorted(out.glob("*/layer_01-*"))
        assert len(ranks) == tensor
        found = sum(torch.load(p)["word_embeddings.weight"].shape[0] for p in ranks)
        assert found == rows
        args = torch.load(next(out.glob("*/mp_rank_00*")), weights_only=False)["args"]
        assert isinstance(args, argparse.Namespace)
        assert args.padded_vocab_size == rows


@pytest.mark.parametrize(
    ("vocab_size", "stored", "tensor", "rows"),
    [
        (50257, 50304, 1, 50304),  # printed by Megatron-LM for GPT-2's vocabulary
        (50257, 50304, 8, 51200),
        (101, 128, 4, 512),
        (None, 50304, 8, 50304),  # the true size is unknown: rows are kept if they can be divided
        (None, 50257, 8, 51200),
    ],
)
def test_padded_vocabulary_sizes(vocab_size, stored, tensor, rows):
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=vocab_size)
    assert target_padded_vocab_size(model, stored, tensor) == rows


def test_indivisible_sizes_are_refused(tmp_path, convert):
    MODELS["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    for flags, message in (
        (("--target-tensor-parallel-size", 3), "num_attention_heads 8 is not divisible"),
        (("--target-pipeline-parallel-size", 4), "4 exceeds num_layers 3"),
    ):
        text = convert(
            "--to",
            "megatron-deepspeed",
            "--input",
            tmp_path / "hf",
            "--output",
            tmp_path / "out",
            *flags,
            code=2,
        )
        assert message in text
        assert not (tmp_path / "out").exists()


def test_separate_query_and_key_value_of_2023(tmp_path, convert):
    """Before November 2023 grouped queries were stored separately from keys and values."""
    model = MODELS["llama"](rope_theta=10000.0)
    model.save_pretrained(tmp_path / "hf")
    there = tmp_path / "there"
    convert(
        "--to",
        "megatron-deepspeed",
        "--input",
        tmp_path / "hf",
        "--output",
        there,
        "--target-tensor-parallel-size",
        2,
    )
    for path in there.glob("*/layer_0[234]-*"):
        layer = torch.load(path)
        fused = layer.pop("self_attention.query_key_value.weight").view(2, 4, 12, 64)
        layer["self_attention.query.weight"] = fused[:, :2].reshape(48, 64).clone()
        layer["self_attention.key_value.weight"] = fused[:, 2:].reshape(48, 64).clone()
        torch.save(layer, path)
    convert("--to", "hf", "--input", there, "--output", tmp_path / "back", "--verify")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_old_layer_numbers_are_read(tmp_path, convert):
    """Before July 2023 layers started at 03, with a gap before the final norm."""
    MODELS["gpt2"]().save_pretrained(tmp_path / "hf")
    there = tmp_path / "there"
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf", "--output", there)
    for path in sorted(there.glob("*/layer_*"), reverse=True):
        number = int(path.name[6:8])
        if number > 1:
            new = number + (1 if number < 5 else 2)
            path.rename(path.with_name(f"layer_{new:02d}{path.name[8:]}"))
    convert("--to", "hf", "--input", there, "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_main_weights_of_zero_are_read(tmp_path, convert, prefix):
    """Flat fp32 arrays are partitioned over two data-parallel ranks, as DeepSpeed writes them."""
    MODELS["gpt2"]().save_pretrained(tmp_path / "fp32")
    there = tmp_path / "there"
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "fp32", "--output", there,
            "--target-tensor-parallel-size", 2)  # fmt: skip
    folder = next(there.glob("global_step*"))
    for rank in range(2):
        names: dict[str, torch.Tensor] = {}
        for number in range(1, 6):
            path = folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
            layer = torch.load(path)
            root = "tied_modules.embed" if number == 1 else str(number)
            names |= {f"{root}.{key}": value for key, value in layer.items()}
            torch.save({key: value.bfloat16() for key, value in layer.items()}, path)
        groups = [{k: v for k, v in names.items() if (v.dim() == 1) == one} for one in (0, 1)]
        main = torch.load(folder / f"mp_rank_{rank:02d}_model_states.pt", weights_only=False)
        main["param_shapes"] = [{k: v.shape for k, v in group.items()} for group in groups]
        torch.save(main, folder / f"mp_rank_{rank:02d}_model_states.pt")
        flats = [torch.cat([v.flatten() for v in group.values()]) for group in groups]
        flats = [torch.cat([flat, torch.zeros(-len(flat) % 4)]) for flat in flats]
        for part in range(2):
            state_dict = {
                "single_partition_of_fp32_groups": [flat.chunk(2)[part].clone() for flat in flats],
                "partition_count": [2, 2],
            }
            name = f"{prefix}zero_pp_rank_{part}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": state_dict}, folder / name)
    convert("--to", "hf", "--input", there, "--output", tmp_path / "bf16")
    convert("--to", "hf", "--input", there, "--output", tmp_path / "main", "--main-weights")
    expected, found = state(tmp_path / "fp32"), state(tmp_path / "main")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    rounded = state(tmp_path / "bf16")
    assert all(torch.equal(expected[key].bfloat16(), rounded[key]) for key in expected)
    (folder / f"{prefix}zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    text = convert("--to", "hf", "--input", there, "--output", tmp_path / "o", "--main-weights",
                   code=2)  # fmt: skip
    assert "1 of 2 data-parallel ranks" in text


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_optimizer_files_contain_the_weights(tmp_path, convert, architecture):
    rope = {"rope_theta": 10000.0} if architecture == "llama" else {}
    MODELS[architecture](**rope).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    there = tmp_path / "there"
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf", "--output", there,
            "--with-optimizer", "--target-tensor-parallel-size", 2,
            "--target-pipeline-parallel-size", 3)  # fmt: skip
    for path in there.glob("*/*.pt"):
        assert zipfile.ZipFile(path).testzip() is None
    for path in there.glob("*/layer_*"):
        layer = torch.load(path)
        torch.save({key: torch.zeros_like(value) for key, value in layer.items()}, path)
    convert("--to", "hf", "--input", there, "--output", tmp_path / "back", "--main-weights",
            "--dtype", "bf16")  # fmt: skip
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("encoder", ["encoder", "transformer"])
@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_names_before_megatron_core(tmp_path, convert, architecture, encoder):
    """``language_model`` with nested dictionaries; tied models have a copy of the embedding."""
    rope = {"rotary_emb_base": 10000} if architecture == "gpt_neox" else {}
    MODELS[architecture](**rope).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", "--ckpt-format", "torch", "--input", tmp_path / "hf",
            "--output", tmp_path / "there")  # fmt: skip
    path = tmp_path / "there" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    old: dict[str, dict] = {"embedding": {}, encoder: {}}
    new = {ours: theirs for theirs, ours in OLD.items()}
    for key, tensor in content["model"].items():
        root, _, inner = renamed(renamed(key, FUSED), new).partition(".")
        if torch.is_tensor(tensor):
            old.setdefault(encoder if root == "decoder" else root, {})[inner] = tensor
    embedding = old["embedding"]
    old["embedding"] = {
        name.removesuffix(".weight"): {"weight": tensor} for name, tensor in embedding.items()
    }
    assert len(old) == (3 if architecture == "gpt_neox" else 2)
    content["model"] = {"language_model": old}
    if architecture == "gpt2":
        copy = torch.zeros_like(embedding["word_embeddings.weight"])
        # Not the last tensor of the file: those that follow the copy are read.
        content["model"] = {"word_embeddings_for_head": {"weight": copy}} | content["model"]
    torch.save(content, path)
    convert("--to", "hf", "--input", tmp_path / "there", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_virtual_stages_are_ordered(tmp_path, convert):
    """With PP2 and two chunks per stage, layers 0 and 2 are on stage 0, 1 and 3 on stage 1."""
    MODELS["llama"](num_hidden_layers=4).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", "--ckpt-format", "torch", "--input", tmp_path / "hf",
            "--output", tmp_path / "there")  # fmt: skip
    whole = tmp_path / "there" / "release" / "mp_rank_00"
    content = torch.load(whole / "model_optim_rng.pt", weights_only=False)
    model = content.pop("model")
    chunks = {(stage, chunk): {} for stage in (0, 1) for chunk in (0, 1)}
    for key, value in model.items():
        if key.startswith("decoder.layers."):
            layer = int(key.split(".")[2])
            chunks[layer % 2, layer // 2][key.replace(f"layers.{layer}.", "layers.0.")] = value
        else:
            chunks[(0, 0) if key.startswith("embedding") else (1, 1)][key] = value
    for stage in (0, 1):
        folder = tmp_path / "virtual" / "iter_0000007" / f"mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        models = {f"model{chunk}": chunks[stage, chunk] for chunk in (0, 1)}
        torch.save({**content, "iteration": 7, **models}, folder / "model_optim_rng.pt")
    convert("--to", "hf", "--input", tmp_path / "virtual", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_scaling_is_stored_in_the_arguments(tmp_path, convert, kind):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more["original_max_position_embeddings"] = 8192
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    scaling |= more if kind == "llama3" else {}
    MODELS["llama"](rope_parameters=scaling).save_pretrained(tmp_path / "hf")
    words = ("--input", tmp_path / "hf", "--output", tmp_path / "mlm")
    convert("--to", "megatron-lm", "--ckpt-format", "torch", *words)
    convert("--to", "hf", "--input", tmp_path / "mlm", "--output", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_parameters"] == scaling
    words = ("--input", tmp_path / "hf", "--output", tmp_path / "mds")
    assert "scaled rotary" in convert("--to", "megatron-deepspeed", *words, code=2)


def test_parallel_residual_is_refused_by_name(tmp_path, convert):
    MODELS["gpt_neox"](use_parallel_residual=True, rotary_emb_base=10000).save_pretrained(
        tmp_path / "hf"
    )
    for target in ("megatron-lm", "megatron-deepspeed"):
        words = ("--input", tmp_path / "hf", "--output", tmp_path / target)
        assert "parallel residual" in convert("--to", target, *words, code=2)
