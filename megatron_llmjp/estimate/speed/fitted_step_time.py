"""Fitted parameters and their errors: ``python -m benchmarks.step_time.fit --write``."""

from __future__ import annotations

from megatron_llmjp.estimate.speed.step_parameters import ModelAccuracy, StepParameters

FITTED = StepParameters(
    ampere_products=0.8688,
    hopper_products=0.6787,
    product_traffic=292.3,
    attention=0.56,
    link=0.9635,
    stragglers=0.04579,
    kernel=0.0002613,
)
ACCURACY = ModelAccuracy(
    runs=70,
    median=0.024,
    percentile_90=0.098,
    low=0.941,
    high=1.069,
)
CORRECTED_ACCURACY = ModelAccuracy(
    runs=65,
    median=0.032,
    percentile_90=0.081,
    low=0.941,
    high=1.062,
)
