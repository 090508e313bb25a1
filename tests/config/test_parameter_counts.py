"""Parameter counts against published ones; test_meta_build.py compares with built models."""

from __future__ import annotations

import pytest

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.parameter_counts import count_parameters
from tests.estimate.test_flops import preset

NON_EMBEDDING = {
    "llm-jp-3-1.8b": 1_459_718_144,
    "llm-jp-3-3.7b": 3_171_068_928,
    "llm-jp-3-13b": 12_688_184_320,
    "llm-jp-3-172b": 169_947_181_056,
}
TOTAL = {"llm-jp-1.3b-v1.0": 1_316_605_952, "llm-jp-13b-v1.0": 12_855_592_960}
PADDED_VOCABULARY = 50_688


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_non_embedding(name):
    assert count_parameters(preset(name)).non_embedding == NON_EMBEDDING[name]


@pytest.mark.parametrize("name", TOTAL)
def test_total(name):
    config = replace_fields(preset(name), padded_vocab_size=PADDED_VOCABULARY)
    assert count_parameters(config).total == TOTAL[name]
