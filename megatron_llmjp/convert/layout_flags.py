"""Flags of ``convert_checkpoint`` for the parallel layout of the output; needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_llmjp.arguments import positive_int
from megatron_llmjp.config.pipeline_layout import expand_pipeline_layout
from megatron_llmjp.config.schema import ParallelConfig

_HELP = {
    "virtual_pipeline_model_parallel_size": (
        "--num-virtual-stages-per-pipeline-rank",
        "N",
        "number of model chunks per stage, of the interleaved schedule",
    ),
    "decoder_first_pipeline_num_layers": (
        "--decoder-first-pipeline-num-layers",
        "N",
        "number of layers of the first stage",
    ),
    "decoder_last_pipeline_num_layers": (
        "--decoder-last-pipeline-num-layers",
        "N",
        "number of layers of the last stage",
    ),
    "account_for_embedding_in_pipeline_split": (
        "--account-for-embedding-in-pipeline-split",
        None,
        "count the embedding as one layer of the first stage",
    ),
    "account_for_loss_in_pipeline_split": (
        "--account-for-loss-in-pipeline-split",
        None,
        "count the output layer and loss as one layer of the last stage",
    ),
    "pipeline_model_parallel_layout": (
        "--pipeline-model-parallel-layout",
        "LAYOUT",
        "contents of each stage, such as 'Et*3|t*4|t*4|t*3L': E embedding, t layer, L loss",
    ),
}

STAGE_FLAGS = {name: flag for name, (flag, _, _) in _HELP.items()}
"""Fields of the parallel layout that divide the layers over stages, and Megatron-LM's flags."""


def add_layout_flags(add: Callable[..., Any]) -> None:
    """Add the flags to a parser, given its ``add_argument``."""
    for kind, size in (("tensor", "TP"), ("pipeline", "PP")):
        add(
            f"--target-{kind}-parallel-size",
            type=positive_int,
            default=1,
            metavar=size,
            help=f"{kind}-parallel size of the output (default: 1; native loads with any size)",
        )
    for name, (flag, metavar, text) in _HELP.items():
        text = f"to megatron-lm: same as Megatron-LM's flag: {text}"
        if metavar is None:
            add(flag, dest=name, action="store_true", help=text)
        else:
            value_type = positive_int if metavar == "N" else str
            add(flag, dest=name, type=value_type, metavar=metavar, help=text)


def target_layout(arguments: argparse.Namespace) -> ParallelConfig:
    """Return the parallel layout of the output.

    The number of virtual stages of ``--pipeline-model-parallel-layout`` follows from its length.
    """
    fields = {name: getattr(arguments, name) for name in STAGE_FLAGS}
    pipeline = arguments.target_pipeline_parallel_size
    layout, virtual = (
        fields["pipeline_model_parallel_layout"],
        "virtual_pipeline_model_parallel_size",
    )
    if layout and fields[virtual] is None:
        chunks, rest = divmod(expand_pipeline_layout(layout).count("|") + 1, pipeline)
        fields[virtual] = chunks if chunks > 1 and not rest else None
    elif fields[virtual] == 1:
        fields[virtual] = None
    return ParallelConfig(
        tensor_model_parallel_size=arguments.target_tensor_parallel_size,
        pipeline_model_parallel_size=pipeline,
        **fields,
    )
