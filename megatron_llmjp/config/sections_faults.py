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
        None,
        description="save and stop (exit code 3) so many minutes after the start of the process; "
        "leave time for the save itself",
    )
    max_bad_steps: PositiveInt = Field(
        5,
        description="steps in a row with a NaN or Inf, none of them applied, that end the run "
        "(exit code 1)",
    )
    max_overflow_steps: PositiveInt = Field(
        25,
        description="fp16: overflows in a row that lower the loss scale; each further one is a bad "
        "step, as is one at the lowest loss scale",
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
    max_spikes: PositiveInt = Field(
        8,
        description="batches among the last 128 steps that spike_action skip may skip; so "
        "many end the run (exit code 1)",
    )
    max_rollbacks: PositiveInt = Field(
        3,
        description="rollbacks within 1,000 iterations; one more spike ends the run (exit code 1)",
    )
    hang_timeout_minutes: NonNegativeFloat | None = Field(
        None,
        description="no progress for so long ends the run and names the rank; 0 for never, 80% of "
        "distributed_timeout_minutes when not given",
    )
