"""--verify: agreement of both sides, and detection of errors in the converter."""

from __future__ import annotations

import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_llmjp.convert import tensors
from megatron_llmjp.convert.formats import rank_files
from megatron_llmjp.convert.formats.hugging_face import config as hf_config
from megatron_llmjp.convert.formats.hugging_face.architectures import llama
from megatron_llmjp.convert.formats.megatron_lm import arguments
from megatron_llmjp.convert.tensors import Part
from megatron_llmjp.convert.verification import reference, verify
from megatron_llmjp.convert.verification.logits import hugging_face_logits
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import MODELS
from tests.support.tolerances import LOGITS, LOSS, assert_close, assert_within


def figures(text: str) -> tuple[float, float, float]:
    """Return the largest logit difference, relative to the largest logit, and the two losses."""
    number = r"([\d.e+-]+)"
    match = re.search(
        rf"difference {number} of logits up to {number}; loss {number} before, {number} after", text
    )
    assert match, text
    difference, largest, before, after = map(float, match.groups())
    return difference / largest, before, after


@pytest.mark.parametrize(
    ("architecture", "changes", "dtype"),
    [
        ("gpt2", {"activation_function": "gelu"}, torch.bfloat16),
        ("gpt_neox", {"hidden_act": "gelu_new"}, torch.float32),
        ("qwen3", {}, torch.float32),
    ],
)
def test_both_sides_agree(tmp_path, convert, architecture, changes, dtype):
    MODELS[architecture](**changes).to(dtype).save_pretrained(tmp_path / "hf")
    text = convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native",
                   "--verify")  # fmt: skip
    difference, before, after = figures(text)
    assert_within(difference, LOGITS, "logits")
    assert_close(before, after, LOSS, "loss")


def test_length_of_the_compared_sequence(tmp_path, convert):
    """Scaled frequencies have an original length; positions beyond it are compared on request."""
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 150}  # fmt: skip
    model = MODELS["llama"](max_position_embeddings=200, rope_scaling=scaling)
    model.save_pretrained(tmp_path / "hf")
    words = ("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "n", "--verify")
    assert "expected 1 to max_position_embeddings 200 of" in convert(
        *words, "--verify-length", 201, code=2
    )
    below = "all positions are below 150, the length from which the rotary frequencies are scaled"
    assert below in convert(*words)
    shutil.rmtree(tmp_path / "n")
    text = convert(*words, "--verify-length", 200)
    assert "1 x 200 tokens" in text and below not in text
    assert_within(figures(text)[0], LOGITS, "logits")


def test_llama_of_megatron_deepspeed_rounded_to_bf16(tmp_path, convert):
    MODELS["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf", "--output", tmp_path / "mds",
            "--target-tensor-parallel-size", 4)  # fmt: skip
    text = convert("--to", "hf", "--input", tmp_path / "mds", "--output", tmp_path / "back",
                   "--dtype", "bf16", "--verify")  # fmt: skip
    assert_within(figures(text)[0], LOGITS, "logits")


@pytest.mark.parametrize(("where", "code"), [(100, 1), (101, 0)])
def test_padding_rows_are_not_compared(tmp_path, convert, monkeypatch, where, code):
    """Tokens are drawn from the vocabulary of 101, logits of the padding rows may differ."""
    MODELS["gpt2"]().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    drawn = []

    def logits(source, tokens, dtype, ignored):
        drawn.append(tokens)
        found = torch.ones(*tokens[:, :-1].shape, source.padded_vocab_size)
        if source.format == "megatron-lm":
            found[..., where:] = 2.0
        return found

    monkeypatch.setattr(verify, "_logits", logits)
    text = convert("--to", "megatron-lm", "--input", tmp_path / "native",
                   "--output", tmp_path / "o", "--verify", code=code)  # fmt: skip
    assert all(tokens.shape == (2, 65) and 90 < tokens.max() < 101 for tokens in drawn)
    assert "verify: 2 x 64 tokens in fp32: " in text
    if code == 0:
        assert figures(text) == (0.0, 4.615121, 4.615121)  # log 101
    else:
        assert "--verify: logits differ by 1.00e+00 of the largest, 1.0e-04 is allowed" in text


def test_no_output_is_left_after_a_difference(tmp_path, convert, monkeypatch):
    """A wrong GELU changes no names or shapes, only the logits."""
    from megatron_llmjp.convert.formats.hugging_face import config as hf_config

    MODELS["gpt2"]().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    monkeypatch.setitem(hf_config.GELU_NAMES, "gelu_tanh", "gelu")
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "o",
                   "--verify", code=1)  # fmt: skip
    assert "logits differ by" in text
    assert [p.name for p in tmp_path.glob("*o*")] == []


def swapped(parts: list[Part], one: int, other: int) -> list[Part]:
    parts[one], parts[other] = parts[other], parts[one]
    return parts


def keys_for_values(tensor, groups, head_dim):
    return swapped(tensors.query_key_value(tensor, groups, head_dim), 1, 2)


def ups_for_gates(tensor):
    return swapped(tensors.gate_up(tensor), 0, 1)


def inputs_for_outputs(tensor):
    """Transpose square matrices."""
    square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
    return tensors.transposed(tensor) if square else tensors.whole(tensor)


def changed(function, **fields):
    """Return the function with changed values in its result."""
    return lambda *args, **kwargs: {**function(*args, **kwargs), **fields}


def other_model(**fields):
    """Return ``validated_model`` with these fields changed in every model."""
    made = hf_config.validated_model
    return lambda where, **given: made(where, **{**given, **fields})


def ranks_joined_end_to_end(name, model, size):
    """Concatenate SwiGLU's ranks without separating gate and up rows."""
    split = tensors.parallel_split(name, model)
    if split == "gate_up" and size > 1:
        return partial(tensors.split_rows, size=size)
    return tensors.rank_layout(name, model, size)


MISTAKES = {
    "keys for values": (llama, "query_key_value", keys_for_values),
    "ups for gates": (llama, "gate_up", ups_for_gates),
    "input for output": (llama, "whole", inputs_for_outputs),
    "base, to Hugging Face": (llama, "rope_keys", changed(hf_config.rope_keys,
        rope_theta=10001.0, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})),
    "base, from Hugging Face": (llama, "validated_model", other_model(rotary_base=20000)),
    "base, from arguments": (arguments, "validated_model", other_model(rotary_base=20000)),
    "epsilon, from Hugging Face": (llama, "validated_model", other_model(norm_epsilon=1e-2)),
    "epsilon, from arguments": (arguments, "validated_model", other_model(norm_epsilon=1e-2)),
    "ranks end to end": (rank_files, "rank_layout", ranks_joined_end_to_end),
}  # fmt: skip
SIDES = {
    **dict.fromkeys(MISTAKES, ("to megatron", "from megatron")),
    **{name: ("to megatron",) for name in MISTAKES if "from Hugging Face" in name},
    **{name: ("from megatron",) for name in MISTAKES if "to Hug" in name or "arguments" in name},
}
CASES = [(mistake, side) for mistake, sides in SIDES.items() for side in sides]


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Write a LLaMA with square attention matrices for Hugging Face and Megatron-LM, TP2 x PP3."""
    from megatron_llmjp.convert.cli import main

    root = tmp_path_factory.mktemp("verify")
    MODELS["llama"](head_dim=8, rope_theta=10000.0).save_pretrained(root / "hf")
    words = ["--to", "megatron-lm", "--ckpt-format", "torch", *TP2PP3]
    assert main([*words, "--input", str(root / "hf"), "--output", str(root / "mlm")]) == 0
    return root


TP2PP3 = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "3"]


@pytest.mark.parametrize(("mistake", "side"), CASES)
def test_an_error_in_the_converter_is_detected(
    tmp_path, convert, megatron, monkeypatch, mistake, side
):
    """Both directions use the same tables, so a round trip does not detect these errors."""
    module, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(module, name, wrong)
    words = {
        "to megatron": ("--to", "megatron-lm", "--ckpt-format", "torch", *TP2PP3,
                        "--input", megatron / "hf"),
        "from megatron": ("--to", "hf", "--input", megatron / "mlm"),
    }[side]  # fmt: skip
    text = convert(*words, "--output", tmp_path / "o", "--verify", code=1)
    assert "logits differ by" in text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("side", ["to native", "from native"])
def test_swapped_keys_and_values_are_detected_in_native_checkpoints(
    tmp_path, convert, monkeypatch, side
):
    MODELS["llama"]().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    monkeypatch.setattr(llama, "query_key_value", keys_for_values)
    there, here = side.split()[1], {"to native": "hf", "from native": "native"}[side]
    target = "hf" if here == there else there
    text = convert("--to", target, "--input", tmp_path / here, "--output", tmp_path / "o",
                   "--verify", code=1)  # fmt: skip
    assert "logits differ by" in text


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [
        ("gpt2", ["--to", "megatron-lm"]),
        ("gpt_neox", ["--to", "megatron-lm", "--ckpt-format", "torch", *TP2PP3]),
        ("gpt2", ["--to", "megatron-deepspeed", *TP2PP3]),
        ("llama", ["--to", "megatron-deepspeed", "--no-pipeline", "--dtype", "bf16"]),
        ("qwen3", ["--to", "megatron-lm", "--ckpt-format", "torch", *TP2PP3]),
    ],
)
def test_the_reference_model_supports_every_layout(tmp_path, convert, architecture, flags):
    rope = {"llama": {"rope_theta": 10000.0}, "gpt_neox": {"rotary_emb_base": 10000}}
    MODELS[architecture](**rope.get(architecture, {})).save_pretrained(tmp_path / "hf")
    text = convert("--input", tmp_path / "hf", "--output", tmp_path / "o", "--verify", *flags)
    assert_within(figures(text)[0], LOGITS, "logits")
    assert "verify: source: transformers" in text
    assert "verify: result: plain PyTorch" in text


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_transformers_must_find_all_tensors(tmp_path, capsys, damage):
    """It only warns and draws missing weights at random. Its progress bars are not shown."""
    MODELS["llama"]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[f"{name}2"] = tensors[name].clone()
    save_file(tensors, path, {"format": "pt"})
    source = SimpleNamespace(path=tmp_path)
    transformers.utils.logging.enable_progress_bar()
    with pytest.raises(
        UserError, match=f"{tmp_path}: transformers reports .*{damage}_keys.*{name}"
    ):
        hugging_face_logits(source, torch.zeros(1, 2, dtype=torch.int64), None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "approximate"),
    [
        ({"bias_gelu_fusion": True}, "tanh"),
        ({"bias_gelu_fusion": True, "onnx_safe": True}, "none"),
        ({"openai_gelu": True}, "tanh"),
        ({"onnx_safe": True, "use_mcore_models": True, "bias_gelu_fusion": True}, "tanh"),
        ({}, "none"),
    ],
)
def test_gelu_of_the_reference_model(args, approximate):
    """Megatron-LM's older models choose by openai_gelu and onnx_safe before the fusion."""
    x = torch.linspace(-3, 3, 50)
    expected = torch.nn.functional.gelu(x, approximate=approximate)
    assert_close(reference._activation(args)(x), expected, 1e-6)
