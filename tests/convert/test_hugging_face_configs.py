"""Options of transformers' configurations that change the network and are not supported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_llmjp.convert.formats.hugging_face.registry import ARCHITECTURES
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
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_an_option_that_changes_the_network_is_refused(name, changes, message):
    config = json.loads(MODELS[name]().config.to_json_string(use_diff=False))
    read = ARCHITECTURES[name].from_config
    assert read(config, "config.json").num_layers == 3
    with pytest.raises(UserError, match=r"config\.json: not supported: ") as error:
        read({**config, **changes}, "config.json")
    assert message in str(error.value)
