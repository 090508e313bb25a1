"""Pipeline stages in Megatron-LM's arguments, and rules for the stages of a written checkpoint.

Source: megatron/training/arguments.py (core 0.6 to 0.19; ``pipeline_model_parallel_layout`` from
core 0.13 on, where ``args`` contain an object with the text in ``input_data``).
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron_llmjp.config.layout_validation import pipeline_problems
from megatron_llmjp.config.pipeline_layout import (
    ModelChunk,
    split_layers,
    virtual_pipeline_size,
)
from megatron_llmjp.config.schema import ModelConfig, ParallelConfig
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.errors import UserError

LAYOUT = "pipeline_model_parallel_layout"
STAGE_FIELDS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    LAYOUT,
)
"""Fields of ``args``, and of ``ParallelConfig``, that divide the layers over the stages."""

_LETTERS = {"embedding": "E", "decoder": "t", "loss": "L"}
"""Names in ``megatron.core.transformer.enums.LayerType``, and letters of the notation."""


def stage_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of ``args`` that describe tensor and pipeline parallelism."""
    chunks = virtual_pipeline_size(parallel)
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "transformer_pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        **{name: getattr(parallel, name) for name in STAGE_FIELDS},
    }


def parallel_of_args(args: Any, where: object) -> ParallelConfig:
    """Return the parallel layout that the arguments of a run describe.

    Args:
        args: the namespace of the checkpoint.
        where: the file, for messages.

    Raises:
        UserError: a field has an unexpected value.
    """
    fields = {name: getattr(args, name, None) for name in STAGE_FIELDS}
    fields[LAYOUT] = _layout_text(fields[LAYOUT], where)
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
    ):
        fields[name] = getattr(args, name, None) or None
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ParallelConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: args.{place} = {first['input']!r}: {first['msg']}") from None


def _layout_text(value: Any, where: object) -> str | None:
    """Return a layout, stored as a text, a list of stages or megatron-core's object, as text."""
    value = getattr(value, "input_data", value)
    if value is None or isinstance(value, str):
        return value
    try:
        stages = ["".join(_LETTERS[str(layer)] for layer in stage) for stage in value]
    except (KeyError, TypeError):
        raise UserError(f"{where}: args.{LAYOUT} = {value!r} is not supported") from None
    return "|".join(stages)


def target_chunks(
    model: ModelConfig, options: ConversionOptions
) -> tuple[tuple[ModelChunk, ...], ...]:
    """Return the model chunks of each pipeline stage of the output.

    Raises:
        UserError: the layers cannot be divided as the options request.
    """
    parallel = options.parallel
    problems = list(pipeline_problems(parallel, model.num_layers))
    if virtual_pipeline_size(parallel) > 1 and parallel.pipeline_model_parallel_size < 2:
        problems.append("several virtual stages require a pipeline parallel size of 2 or more")
    if problems:
        raise UserError("; ".join(problems))
    return split_layers(parallel, model.num_layers)


def describe_saved_layout(args: Any, num_layers: int) -> str:
    """Return the parallel layout of the run that saved a checkpoint; '' if it is not known."""
    try:
        parallel = parallel_of_args(args, "args")
        stages = split_layers(parallel, num_layers)
    except UserError:
        return ""
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    counts = [[chunk.layers for chunk in stage] for stage in stages]
    return f", saved with TP {sizes[0]} x PP {sizes[1]}{describe_stages(counts)}"


def describe_stages(stages: list[list[int]]) -> str:
    """Return a description of stages that differ from equal stages of one chunk; else ''.

    Args:
        stages: number of layers of each chunk of each stage.
    """
    chunks = len(stages[0])
    text = f" x VP {chunks}" if chunks > 1 else ""
    if len({count for stage in stages for count in stage}) > 1:
        counts = ["+".join(map(str, stage)) for stage in stages]
        text += f", stages of {', '.join(counts)} layers"
    return text
