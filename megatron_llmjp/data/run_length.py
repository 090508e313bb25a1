"""Length of a run: the iteration at which train_iters, train_samples or train_tokens ends it.

Whichever is reached first ends the run. The units count as in Megatron-LM and Megatron-DeepSpeed:
samples end at the last full batch, tokens with the first batch that reaches them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes


@dataclass(frozen=True)
class Limit:
    """One limit of a run."""

    name: str
    """The field that sets it."""
    value: int
    iteration: int
    """The last iteration within the limit."""
    samples: int
    """Samples that the data must hold for it."""

    def __str__(self) -> str:
        return f"{self.name} {self.value:,}"


def limits(config: Config, sizes: BatchSizes) -> list[Limit]:
    """The limits that a configuration sets, the first to be reached first."""
    training, found = config.training, []
    if training.train_iters is not None:
        iters = training.train_iters
        found.append(Limit("train_iters", iters, iters, sizes.consumed_after(iters)))
    if training.train_samples is not None:
        samples = training.train_samples
        iteration, rest = sizes.iterations(samples)
        found.append(Limit("train_samples", samples, iteration, samples - rest))
    if training.train_tokens is not None:
        samples = math.ceil(training.train_tokens / config.data.seq_length)
        iteration, rest = sizes.iterations(samples)
        last = iteration + (rest > 0)
        found.append(Limit("train_tokens", training.train_tokens, last, samples))
    return sorted(found, key=lambda limit: limit.iteration)


def last_iteration(config: Config, sizes: BatchSizes) -> int | None:
    """The iteration that the first limit ends the run at; None without a limit."""
    return min((limit.iteration for limit in limits(config, sizes)), default=None)


def planned_samples(config: Config, sizes: BatchSizes) -> int | None:
    """Samples that a run is planned for, whether or not train_tokens ends it earlier.

    Megatron-LM draws so many samples from its datasets, and decays the learning rate and raises the
    weight decay over as many, where nothing else is given.
    """
    training = config.training
    if training.train_samples is not None:
        return training.train_samples
    end = training.train_iters or last_iteration(config, sizes)
    return None if end is None else sizes.consumed_after(end)
