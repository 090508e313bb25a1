"""What a run does when something goes wrong, or when it has to leave."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_llmjp.config.section import Section


class FaultsConfig(Section):
    """Stops, bad numbers and hangs."""

    exit_interval: PositiveInt | None = Field(
        None, description="save and stop (exit code 3) at iterations divisible by this"
    )
    exit_duration_in_mins: PositiveFloat | None = Field(
        None, description="save and stop (exit code 3) after so many minutes"
    )
    max_bad_steps: PositiveInt = Field(
        5, description="steps in a row with a NaN or Inf, none of them taken, that end the run"
    )
    spike_action: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn",
        description="on a gradient norm far above the usual: tell; leave the batch out; or go back "
        "to the last checkpoint and leave out the batches that led there",
    )
    spike_threshold: float = Field(
        10.0, gt=1.0, description="times the median of the last 128 norms that make a spike"
    )
    spike_skip_iterations: PositiveInt = Field(
        20, description="batches that a rollback leaves out, up to and with the spike's"
    )
    hang_timeout_minutes: NonNegativeFloat | None = Field(
        None,
        description="no progress for so long ends the run and names the rank; 0 for never, 80% of "
        "distributed_timeout_minutes when not given",
    )
