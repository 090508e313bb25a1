"""Python interface for notebooks: data, runs, metrics, models, estimates, conversion.

``import megatron_llmjp as ml`` provides all of it (docs/api.md); modules are imported at first use.
"""
