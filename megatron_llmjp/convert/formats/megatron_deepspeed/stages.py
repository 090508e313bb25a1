"""Pipeline stages of Megatron-DeepSpeed, which DeepSpeed divides by itself.

Megatron-DeepSpeed passes ``partition_method="type:transformer"``: stages have equal numbers of
layers, and other modules go with the first and the last layer (deepspeed/runtime/pipe/module.py,
``_partition_layers``; deepspeed/runtime/utils.py, ``partition_balanced``). If the layers are not
divisible, DeepSpeed 0.10 fills each stage in turn, and 0.19 makes the stages as equal as possible.
"""

from __future__ import annotations

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.errors import UserError


def check_stages(model: ModelConfig, options: ConversionOptions) -> None:
    """Check that DeepSpeed can divide the layers as the options request.

    Raises:
        UserError: it cannot.
    """
    if options.stage_flags:
        raise UserError(
            f"{', '.join(options.stage_flags)}: Megatron-DeepSpeed has no such option: DeepSpeed "
            "divides the layers equally (partition_method type:transformer), and its pipeline "
            "engine has no virtual stages"
        )
    if options.pipeline_parallel > model.num_layers:
        raise UserError(
            f"pipeline parallel size {options.pipeline_parallel} exceeds num_layers "
            f"{model.num_layers}"
        )
    if options.with_optimizer:
        stage_layers(model.num_layers, options.pipeline_parallel)


def stage_layers(layers: int, stages: int) -> list[range]:
    """Return the layers of each pipeline stage.

    Raises:
        UserError: versions of DeepSpeed divide the layers differently.
    """
    most = -(-layers // stages)
    filled = [min(most, max(0, layers - most * stage)) for stage in range(stages)]
    balanced = [(layers + stages - 1 - stage) // stages for stage in range(stages)]
    if filled != balanced:
        raise UserError(
            f"--with-optimizer: versions of DeepSpeed divide {layers} layers over {stages} stages "
            f"differently ({_listed(filled)} up to 0.10, {_listed(balanced)} in 0.19), and "
            "optimizer files belong to stages: choose a pipeline parallel size that divides "
            f"{layers}"
        )
    starts = [sum(balanced[:stage]) for stage in range(stages)]
    return [range(start, start + n) for start, n in zip(starts, balanced, strict=True)]


def _listed(numbers: list[int]) -> str:
    return " + ".join(map(str, numbers))
