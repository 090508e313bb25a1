"""``inspect A B``: the differences between two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.verification.model_differences import TRAINING_FIELDS, model_differences
from tests.convert.hf_models import gpt2, llama

FIXTURES = Path(__file__).parent / "fixtures"


def changed(folder, source, change):
    """Copy a Hugging Face model and change its tensors."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def model(tmp_path):
    llama().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("target", ["native", "megatron-lm", "megatron-deepspeed"])
def test_a_converted_checkpoint_is_equal(tmp_path, convert, target):
    gpt2().save_pretrained(tmp_path / "hf")
    convert("--to", target, "--input", tmp_path / "hf", "--output", tmp_path / "there",
            "--target-tensor-parallel-size", 2)  # fmt: skip
    text = convert("inspect", tmp_path / "hf", tmp_path / "there")
    assert "rows 101 to 255 exist in one only and are not compared" in text
    assert text.splitlines()[-1] == "equal: 40 tensors, bit by bit"


def test_differences_are_those_of_numpy(tmp_path, convert, model):
    key = "model.layers.1.mlp.up_proj.weight"
    before = load_file(model / "model.safetensors")[key].numpy().astype(np.float64)

    def change(tensors):
        tensors[key][3:5, 7] += torch.tensor([0.25, -0.5])
        tensors["model.norm.weight"][2] = torch.nan

    other = changed(tmp_path / "other", model, change)
    after = load_file(other / "model.safetensors")[key].numpy().astype(np.float64)
    text = convert("inspect", model, other, "--json", code=1)
    found = json.loads(text)
    assert not found["equal"] and found["tensors"] == 21
    norm, up = sorted(found["differences"], key=lambda each: each["elements"])
    gap = np.abs(after - before)
    rows = before.shape[0]
    assert up["name"] == "decoder.layers.1.mlp.linear_fc1.weight"  # gate, then up
    assert (up["differing"], up["elements"]) == (2, 2 * before.size)
    assert up["max_abs"] == gap.max() and up["index"] == [rows + 4, 7]
    assert up["values"] == [before[4, 7], after[4, 7]]
    gate = load_file(model / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"].numpy()
    whole = np.linalg.norm(np.concatenate([gate.astype(np.float64), before]))
    assert up["relative"] == pytest.approx(np.linalg.norm(gap) / whole, rel=1e-12)
    assert (norm["name"], norm["differing"]) == ("decoder.final_layernorm.weight", 1)
    assert (norm["not_finite"], norm["values"]) == (1, None)
    text = convert("inspect", model, other, code=1)
    assert "linear_fc1.weight: 2 of 22,528 elements differ, at most by 0.5 at [180, 7]" in text
    assert "final_layernorm.weight: 1 of 64 elements differ; 1 with NaN or infinity" in text
    assert "2 of 21 tensors differ; largest difference 0.5 in decoder.layers.1" in text
    assert convert("inspect", other, other).startswith("equal")  # NaN is equal to itself


def test_zeros_of_other_sign_and_other_types_differ(tmp_path, convert, model):
    def negative_zero(tensors):
        tensors["model.norm.weight"][5] = -0.0

    zero = changed(tmp_path / "zero", model, lambda t: t["model.norm.weight"][5:6].zero_())
    other = changed(tmp_path / "other", model, negative_zero)
    text = convert("inspect", zero, other, code=1)
    assert "1 of 64 elements differ, at most by 0 at [5]: 0 / -0" in text

    def to_fp16(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16().half()

    def rounded(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16().half().float()

    half = changed(tmp_path / "half", model, to_fp16)
    single = changed(tmp_path / "single", model, rounded)
    text = convert("inspect", half, single, code=1)
    assert "decoder.final_layernorm.weight: type fp16 / fp32, equal values\n1 of 21" in text


def test_other_architectures_differ(tmp_path, convert, model):
    config = json.loads((model / "config.json").read_text())
    other = changed(tmp_path / "other", model, lambda _: None)
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert "model: norm_epsilon: 3e-05 / 1e-06\n0 of 21" in convert("inspect", model, other, code=1)
    llama(num_hidden_layers=2, intermediate_size=160).save_pretrained(tmp_path / "small")
    text = convert("inspect", model, tmp_path / "small", code=1)
    assert f"decoder.layers.2.mlp.linear_fc2.weight: only in {model}" in text
    assert "decoder.layers.0.mlp.linear_fc2.weight: shape (64, 176) / (64, 160)" in text
    assert "model: num_layers: 3 / 2" in text and "model: ffn_hidden_size: 176 / 160" in text


def test_errors_have_exit_code_2(tmp_path, convert, model):
    assert "does not exist" in convert("inspect", model, tmp_path / "no", code=2)
    assert "--json requires two" in convert("inspect", model, "--json", code=2)


CHANGES = {
    "num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 1,
    "kv_channels": 3, "ffn_hidden_size": 7, "rotary_base": 7, "rotary_percent": 0.5,
    "rotary_seq_len_interpolation_factor": 2, "position_embedding_type": "yarn",
    "use_rope_scaling": True, "normalization": "LayerNorm", "norm_epsilon": 0.1,
    "activation_function": "gelu", "add_bias_linear": True, "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": False, "use_parallel_residual": True,
    "qk_layernorm": True, "num_moe_experts": 4,
}  # fmt: skip
OF_EXPERTS = {
    "moe_layer_freq": 2, "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_score_function": "sigmoid", "moe_router_dtype": "fp32",
    "moe_token_drop_policy": "position",
}  # fmt: skip


def test_every_field_of_the_function_is_compared():
    model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4)
    for name, value in CHANGES.items():
        assert name in model_differences(model, model.model_copy(update={name: value})), name
    for kind, base in (
        ("yarn", model.model_copy(update={"position_embedding_type": "yarn"})),
        ("rope_scaling", model.model_copy(update={"use_rope_scaling": True})),
        ("moe_", model.model_copy(update={"num_moe_experts": 4})),
    ):
        for name in ModelConfig.model_fields:
            if name.startswith(kind) and name not in TRAINING_FIELDS:
                change = {name: OF_EXPERTS.get(name, 99)}
                assert name in model_differences(base, base.model_copy(update=change)), name
                assert not model_differences(model, model.model_copy(update=change)), name
    kinds = ("yarn_", "rope_scaling_", "moe_")
    prefixed = {n for n in ModelConfig.model_fields if n.startswith(kinds)}
    assert ModelConfig.model_fields.keys() == {*CHANGES, *TRAINING_FIELDS, *prefixed}
