"""Fitted parameters and their errors: ``python -m benchmarks.step_time.fit --write``."""

from __future__ import annotations

from megatron_llmjp.estimate.step_parameters import ModelAccuracy, StepParameters

FITTED = StepParameters(
    ampere_products=0.8869,
    hopper_products=0.6825,
    product_traffic=316.0,
    attention=0.4898,
    link=0.9232,
    stragglers=0.0444,
    kernel=0.0002233,
)
ACCURACY = ModelAccuracy(
    runs=70,
    median=0.025,
    percentile_90=0.097,
    low=0.941,
    high=1.067,
)
