"""Estimates of runs: parameters, memory, time, computed without running them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from megatron_llmjp.api.errors import raises_user_errors
from megatron_llmjp.api.flags import flag_words
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.estimate_numbers import estimate_numbers
from megatron_llmjp.estimate.estimate_report import format_estimate
from megatron_llmjp.planning import plan_run


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run.

    Attributes:
        numbers: all numbers, in bytes, seconds and FLOPs, as ``--estimate --json`` prints them.
        report: the report as text, as ``--estimate`` prints it.
        config: the configuration.
        notes: what is missing here and was replaced.
        warnings: valid settings that are known to cause problems.
    """

    numbers: Mapping[str, Any]
    report: str
    config: Config
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether all ranks fit into the memory of their GPUs."""
        return bool(self.numbers["fits"])

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return int(self.numbers["parameters"]["total"])

    @property
    def step_seconds(self) -> float:
        """Predicted time of an iteration."""
        return float(self.numbers["step_seconds"])

    @property
    def run_seconds(self) -> float | None:
        """Predicted time of the run without failures; None if its length is not known."""
        found = self.numbers["run_seconds"]
        return None if found is None else float(found)

    def __repr__(self) -> str:
        gpus = f"{self.numbers['gpus']} x {self.numbers['gpu']['name']}"
        return (
            f"Estimate({gpus}, parameters={self.parameters:,}, fits={self.fits}, "
            f"step_seconds={self.step_seconds:.3g})"
        )


@raises_user_errors
def load_config(config: str | PathLike[str] | None = None, **fields: Any) -> Config:
    """Return the configuration of a run, as ``pretrain_gpt`` parses it.

    Args:
        config: a preset or a YAML file; without it Megatron-LM's defaults apply.
        fields: fields and flags of a run, such as ``num_layers=12``.

    Raises:
        UserError: every unknown field and invalid value, one per line.

    Example:
        >>> config = ml.load_config("laptop-llama", num_layers=3)
        >>> config.model.num_layers, config.model.position_embedding_type
        (3, 'rope')
    """
    return parse(flag_words({"config": config, **fields})).config


@raises_user_errors
def estimate_run(
    config: str | PathLike[str] | None = None, *, gpus: int, gpu_type: str, **fields: Any
) -> Estimate:
    """Estimate memory, step time and days of a run; nothing is run.

    Args:
        config: a preset or a YAML file.
        gpus: number of GPUs.
        gpu_type: such as ``H100-80GB`` (docs/estimate.md).
        fields: fields and flags of a run, such as ``tensor_model_parallel_size=4``.

    Raises:
        UserError: the configuration is invalid, or the GPU type is unknown.

    Example:
        >>> found = ml.estimate_run("llm-jp-3-1.8b", gpus=128, gpu_type="H100")
        >>> found.fits, found.parameters
        (True, 1867614208)
        >>> found.step_seconds < 60
        True
        >>> print(found.report.splitlines()[0])
        128 H100: TP 1 x PP 1 x DP 128; 1 micro-batch of size 4 per replica and step
    """
    words = flag_words({"config": config, "world_size": gpus, "gpu": gpu_type, **fields})
    command = parse(["--estimate", *words])
    planned = plan_run(command)
    return Estimate(
        numbers=estimate_numbers(planned.estimate),
        report=format_estimate(planned.estimate, command.config_name),
        config=planned.estimate.config,
        notes=planned.notes,
        warnings=planned.warnings,
    )
