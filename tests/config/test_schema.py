"""Every field is read by some module and has a description."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megatron_llmjp
from megatron_llmjp.config.schema import SECTION_OF, SECTIONS

PACKAGE = Path(megatron_llmjp.__file__).parent
DECLARING = (
    "model_config", "run_config", "logging_config", "profiling_config", "validation",
    "layout_validation", "expert_", "warnings", "megatron", "flags", "loading",
)  # fmt: skip
"""Files of config/ that declare, check or name fields without using their values."""
BY_PROPERTY = {
    # fields that are read through properties of the schema
    "num_query_groups": "query_groups",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_size",
    "max_position_embeddings": "max_positions",
    "moe_layer_freq": "expert_layers",
    "moe_ffn_hidden_size": "expert_ffn_size",
    "expert_tensor_parallel_size": "expert_tensor_size",
    "make_vocab_size_divisible_by": "compute_padded_vocab_size",
}


@pytest.fixture(scope="module")
def code():
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if not (path.parent.name == "config" and path.name.startswith(DECLARING))
        and path.parent.name != "convert"
    ]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("name", SECTION_OF)
def test_every_field_is_read(code, name):
    assert re.search(rf"\.{BY_PROPERTY.get(name, name)}\b", code), f"nothing reads {name}"


def test_every_field_has_a_description():
    for name, section in SECTION_OF.items():
        description = SECTIONS[section].model_fields[name].description
        assert description and not description.endswith("."), name
