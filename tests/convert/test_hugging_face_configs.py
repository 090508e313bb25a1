"""Options of transformers' configurations that change the network and are not supported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_llmjp.convert.formats.hugging_face.architectures.registry import ARCHITECTURES
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import MODELS

YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt_neox", {"hidden_act": "silu"}, "hidden_act 'silu'"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias false"),
    ("gpt_neox", {"rope_parameters": None, "rope_scaling": YARN}, "yarn rope scaling"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"attention_bias": True}, "attention_bias without mlp_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias without attention_bias"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic"}}, "'dynamic'"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_an_option_that_changes_the_network_is_refused(name, changes, message):
    config = json.loads(MODELS[name]().config.to_json_string(use_diff=False))
    read = ARCHITECTURES[name].from_config
    assert read(config, "config.json").num_layers == 3
    with pytest.raises(UserError, match=r"config\.json: not supported: ") as error:
        read({**config, **changes}, "config.json")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["qwen3"])
def test_an_unknown_key_is_refused_by_name(name):
    config = json.loads(MODELS[name]().config.to_json_string(use_diff=False))
    read = ARCHITECTURES[name].from_config
    assert read({**config, "new_switch": False, "is_decoder": True}, "config.json").num_layers == 3
    with pytest.raises(UserError, match=r"config\.json: unknown: logit_scale = 0.5"):
        read({**config, "logit_scale": 0.5}, "config.json")
