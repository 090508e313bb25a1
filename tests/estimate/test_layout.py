"""Pipeline split, bubble and micro-batches in flight, compared with closed forms."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.pipeline_layout import split_layers
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.layout import make_layout
from tests.estimate.test_flops import preset

SPLITS: list[tuple[dict[str, Any], list[list[int]]]] = [
    ({}, [[8]]),
    ({"pipeline_model_parallel_size": 4}, [[2], [2], [2], [2]]),
    (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        [[2, 2], [2, 2]],
    ),
    (
        {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2},
        [[2], [3], [3]],
    ),
    (
        {
            "num_layers": 7,
            "pipeline_model_parallel_size": 4,
            "account_for_loss_in_pipeline_split": True,
        },
        [[2], [2], [2], [1]],
    ),
    (
        {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": "Et*3|t|(t|)*1t*3L",
        },
        [[3, 1], [1, 3]],
    ),
]


@pytest.mark.parametrize(("values", "expected"), SPLITS)
def test_layers_of_each_stage(values, expected):
    config = replace_fields(preset("laptop-llama"), **{"num_layers": 8, **values})
    stages = split_layers(config.parallel, config.model.num_layers)
    assert [[chunk.layers for chunk in stage] for stage in stages] == expected
    assert stages[0][0].embedding and stages[-1][-1].output
    chunks = sorted((c for stage in stages for c in stage), key=lambda c: c.first_layer)
    assert sum(c.embedding for c in chunks) == sum(c.output for c in chunks) == 1
    assert [c.first_layer for c in chunks][1:] == [c.first_layer + c.layers for c in chunks][:-1]


def test_172b_on_512_gpus():
    layout = make_layout(preset("llm-jp-3-172b"), 512)
    assert (layout.dp, layout.micro_batches) == (8, 216)
    assert layout.bubble == pytest.approx(15 / 231)
    assert [layout.in_flight(stage) for stage in (0, 7, 15)] == [16, 9, 1]
    assert layout.rank(tp=3, cp=0, dp=7, pp=0) == 31 and layout.rank(0, 0, 0, 15) == 480


def test_interleaving_reduces_the_bubble_and_holds_more_activations():
    values = {"pipeline_model_parallel_size": 4, "global_batch_size": 128, "num_layers": 8}
    plain = make_layout(replace_fields(preset("laptop-llama"), **values), 4)
    config = replace_fields(
        preset("laptop-llama"), virtual_pipeline_model_parallel_size=2, **values
    )
    interleaved = make_layout(config, 4)
    assert (plain.bubble, interleaved.bubble) == (3 / 19, 3 / 35)
    # Layers in flight at the first stage: 4 micro-batches x 2 layers; 11 chunks x 1 layer.
    assert plain.in_flight(0) * 2 == 8 and interleaved.in_flight(0) == 11


@pytest.mark.parametrize(
    ("values", "world", "words"),
    [
        ({"tensor_model_parallel_size": 2}, 3, "3 processes"),
        ({"global_batch_size": 24}, 2, "global_batch_size 24"),
        ({"pipeline_model_parallel_size": 3}, 3, "4 layers"),
    ],
)
def test_indivisible_sizes(values, world, words):
    with pytest.raises(UserError, match=words):
        make_layout(replace_fields(preset("laptop-llama"), micro_batch_size=8, **values), world)
