"""Parameters of the step-time model: those fitted to published runs, and constants.

``python -m benchmarks.step_time.fit --write`` fits the parameters and writes
``fitted_step_time.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_EFFICIENCY = 0.85
"""Fraction of the bandwidth of GPU memory that kernels reach, as the STREAM benchmark does."""
NETWORK_EFFICIENCY = 0.9
"""Fraction of the network bandwidth that messages of many MB reach, as in nccl-tests."""


@dataclass(frozen=True)
class StepParameters:
    """Fitted parameters, all positive."""

    ampere_products: float
    """Fraction of the peak that infinitely large matrix products reach on A100."""
    hopper_products: float
    """The same on H100."""
    product_traffic: float
    """FLOPs that a GPU could have performed in the time of one byte read or written by a matrix
    product: its efficiency falls for small sizes."""
    attention: float
    """Efficiency of FlashAttention relative to matrix products."""
    link: float
    """Fraction of the link bandwidth at which tensor-parallel communication would take its exposed
    time, were nothing of it overlapped."""
    stragglers: float
    """Standard deviation of the step time of a replica, as a fraction."""
    kernel: float
    """Seconds per layer and pass in which a GPU waits for kernels to start."""


@dataclass(frozen=True)
class ModelAccuracy:
    """Errors of the step-time model on published runs, each predicted from others."""

    runs: int
    median: float
    """Median of the absolute error, as a fraction of the published step time."""
    percentile_90: float
    low: float
    """Published divided by predicted step time that 10 % of the runs fall below."""
    high: float
    """The same that 10 % of the runs exceed."""
