"""RoPE parameters and biases in config.json are interpreted as in transformers."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_llmjp.convert.formats.hugging_face.architectures.llama import ARCHITECTURE
from megatron_llmjp.convert.formats.hugging_face.config import rope_fields, rope_keys
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import llama, state
from tests.convert.megatron_parts import assert_parts_of

SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 101,
         "intermediate_size": 80, "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OTHER = {"low_freq_factor": 2.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 40}
SCALINGS = [
    None,
    {},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"type": "linear", "rope_type": "default", "factor": 4.0},
    {"rope_type": "llama3", "type": "linear", "factor": 32.0, **LLAMA3},
    {"rope_type": "llama3", "factor": 4.0, **OTHER},
]


@pytest.mark.parametrize(
    "legacy", [{}, {"rope_theta": 9000.0}, {"original_max_position_embeddings": 20}]
)
def test_parameters_are_resolved_as_transformers_does(legacy):
    for scaling, parameters in itertools.product(SCALINGS, SCALINGS):
        given = {**SIZES, **legacy, "rope_scaling": scaling, "rope_parameters": parameters}
        expected = transformers.LlamaConfig(**json.loads(json.dumps(given))).rope_parameters
        found = rope_fields(given, "config.json")
        kind = expected["rope_type"]
        assert found["rotary_base"] == expected["rope_theta"]
        assert found.get("rotary_seq_len_interpolation_factor") == (
            expected["factor"] if kind == "linear" else None
        )
        assert found.get("use_rope_scaling", False) == (kind == "llama3")
        if kind == "llama3":
            for key in ("factor", *LLAMA3):
                field = "rope_scaling_" + key
                assert found[field] == expected[key]


def test_unsupported_rope_settings_are_refused():
    for scaling in (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": "4"},
        {"rope_type": "yarn", "factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "truncate": 1},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 0},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 40.5},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "linear", "factor": "4"},
        {"full_attention": {"rope_type": "default"}},
        ["linear"],
    ):
        with pytest.raises(UserError, match=r"config\.json: "):
            rope_fields({**SIZES, "rope_scaling": scaling}, "config.json")


@pytest.mark.parametrize("scaling", [SCALINGS[2], SCALINGS[6], SCALINGS[4]])
def test_exports_are_read_by_every_version(scaling):
    model = ARCHITECTURE.from_config({**SIZES, "rope_scaling": scaling}, "config.json")
    keys = json.loads(json.dumps(rope_keys(model)))
    now = transformers.LlamaConfig(**SIZES, **json.loads(json.dumps(keys))).rope_parameters
    assert now["rope_type"] == scaling.get("rope_type", scaling.get("type"))
    older = keys["rope_scaling"]
    if now["rope_type"] == "linear":  # to 4.42: these two, and the factor a float above 1
        assert older == {"type": "linear", "factor": 4.0}
        assert isinstance(older["factor"], float)
    elif now["rope_type"] == "llama3":  # from 4.43: both names
        assert older["type"] == older["rope_type"] == "llama3"
        assert older.items() >= {"factor": 32.0, **LLAMA3}.items()
    else:
        assert older is None
    assert keys["rope_theta"] == now["rope_theta"]


def test_an_edited_rope_scaling_takes_precedence(tmp_path, convert):
    """An export has both keys; users who edit config.json may change only ``rope_scaling``."""
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    config = json.loads(path.read_text())
    config |= {"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}}
    path.write_text(json.dumps(config))
    words = ("--to", "megatron-lm", "--ckpt-format", "torch", "--verify")
    convert(*words, "--input", tmp_path / "export", "--output", tmp_path / "mlm")
    convert("--to", "hf", "--verify", "--input", tmp_path / "mlm", "--output", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in ("max_position_embeddings", "rope_scaling"):
        assert back[key] == config[key]


def test_llama3_scaling_with_other_constants(tmp_path, convert):
    """transformers and megatron-core compute the same logits, in both directions."""
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, **OTHER}
    model = llama(rope_parameters=parameters, max_position_embeddings=160)
    model.save_pretrained(tmp_path / "hf")
    words = ("--verify", "--input")
    convert("--to", "native", *words, tmp_path / "hf", "--output", tmp_path / "n")
    convert("--to", "hf", *words, tmp_path / "n", "--output", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["rope_parameters"] == parameters
    config = tmp_path / "n" / "iter_0000000" / "config.yaml"
    assert "rope_scaling_original_max_position_embeddings: 40" in config.read_text()
    text = convert("--to", "megatron-lm", "--input", tmp_path / "n", "--output", tmp_path / "m",
                   code=2)  # fmt: skip
    assert "rope_scaling_low_freq_factor 2.5, rope_scaling_high_freq_factor 6.0" in text


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 24.0,
        "beta_slow": 2.0, "original_max_position_embeddings": 40, "truncate": True}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"truncate": False, "factor": 2.5}]
)
def test_yarn(tmp_path, convert, more):
    """transformers and megatron-core compute the same logits, in both directions."""
    model = llama(rope_parameters={**YARN, **more}, max_position_embeddings=160)
    model.save_pretrained(tmp_path / "hf")
    words = ("--verify", "--verify-length", 160, "--tolerance", 1e-5, "--input")
    text = convert("--to", "native", *words, tmp_path / "hf", "--output", tmp_path / "n")
    assert "1 x 160 tokens" in text and "all positions are below" not in text
    text = convert("--to", "hf", *words, tmp_path / "n", "--output", tmp_path / "back")
    assert ("transformers 4.51 to 4.55 scale by" in text) == ("factor" in more)  # 2.5 x 40 != 160
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["rope_parameters"] == {**YARN, **more}
    assert back["rope_scaling"]["type"] == back["rope_scaling"]["rope_type"] == "yarn"
    for target in ("megatron-lm", "megatron-deepspeed"):
        words = ("--to", target, "--input", tmp_path / "n", "--output", tmp_path / "m")
        assert re.search("YaRN|scaled rotary", convert(*words, code=2))


BOTH = {"mscale": 0.7, "mscale_all_dim": 0.4}


@pytest.mark.parametrize("more", [{}, {"mscale": 0.7}, {"mscale_all_dim": 0.4}, BOTH])
def test_one_yarn_scale_alone_has_no_effect(more):
    """transformers scales queries and keys by the factor alone, or by both."""

    def scale(**changes: float) -> float:
        config = transformers.LlamaConfig(**SIZES, rope_parameters={**YARN, **changes})
        return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))[1]

    def fields(**changes: float) -> dict[str, object]:
        return rope_fields({**SIZES, "rope_parameters": {**YARN, **changes}}, "config.json")

    assert (scale(**more) == scale()) == (fields(**more) == fields()) == (more != BOTH)


def test_biases_of_every_linear_layer_are_kept(tmp_path, convert):
    model = llama(attention_bias=True, mlp_bias=True, rope_theta=10000.0)
    model.save_pretrained(tmp_path / "hf")
    sizes = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "3")
    convert("--to", "megatron-lm", "--ckpt-format", "torch", "--verify", *sizes,
            "--input", tmp_path / "hf", "--output", tmp_path / "mlm")  # fmt: skip
    assert_parts_of(model, tmp_path / "mlm" / "release", 2, padded=256)
    convert("--to", "native", "--input", tmp_path / "mlm", "--output", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    before, after = state(tmp_path / "hf"), state(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    words = ("--to", "native", "--output", tmp_path / "o", "--input", tmp_path / "one")
    llama(mlp_bias=True).save_pretrained(tmp_path / "one")
    assert "mlp_bias without attention_bias" in convert(*words, code=2)
