"""Plans and estimates of published runs, which the pictures show."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.config.flags import Command, parse
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.run_estimate import RunEstimate, estimate_run

ROOT = Path(__file__).resolve().parents[3]


def command(line: str) -> Command:
    """Return the parsed arguments of a command line of ``pretrain_gpt``."""
    return parse(line.split())


def config(line: str) -> Config:
    """Return the configuration of a command line of ``pretrain_gpt``."""
    return command(line).config


def estimate(line: str) -> RunEstimate:
    """Return the estimate of a command line with ``--estimate``."""
    parsed = command(f"{line} --estimate")
    assert parsed.machine is not None
    return estimate_run(parsed.config, parsed.machine)
