"""Configuration section of logs, metrics and alerts."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, PositiveInt, SecretStr

from megatron_llmjp.config.section import Section
from megatron_llmjp.interval_stats import SLOW_SHARE

LogFormat: TypeAlias = Literal["short", "megatron", "json"]
"""Format of the log lines."""


class LoggingConfig(Section):
    """Logs and metrics."""

    log_interval: PositiveInt = Field(10, description="iterations per log line")
    log_format: LogFormat | None = Field(
        None,
        exclude=True,
        description="format of the log lines: short has at most 120 columns, megatron is "
        "Megatron-LM's, json has an object per line; not stored with the run; default: short in a "
        "terminal, megatron elsewhere",
    )
    tensorboard_dir: str | None = Field(
        None, description="folder of TensorBoard events; default: SAVE/tensorboard"
    )
    report: bool = Field(
        True, description="write SAVE/report/report.html and figures when the run is finished"
    )
    log_params_norm: bool = Field(True, description="log the norm of all parameters")
    log_straggler: bool = Field(
        True, description="measure the computing time of each rank, and report a slow rank"
    )
    straggler_share: float = Field(
        SLOW_SHARE,
        gt=0.0,
        lt=1.0,
        description="report a rank as slow if others wait for it for at least this share of an "
        "iteration",
    )
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; disabled by default"
    )
    wandb_entity: str | None = Field(None, description="Weights & Biases user or team")
    wandb_exp_name: str | None = Field(
        None, description="Weights & Biases name of the run; default: name of the save folder"
    )
    alert_webhook: SecretStr | None = Field(
        None,
        exclude=True,
        description="URL that receives each alert as a POST request with JSON; not stored with "
        "the run. MEGATRON_LLMJP_ALERT_WEBHOOK keeps it out of the command line",
    )
    alert_command: SecretStr | None = Field(
        None,
        exclude=True,
        description="shell command that receives each alert as JSON on its standard input; not "
        "stored with the run, and refused in files",
    )
    gpu_peak_tflops: float | None = Field(
        None,
        gt=0.0,
        description="peak TFLOP/s of one GPU, for the MFU; known for common GPUs",
    )
