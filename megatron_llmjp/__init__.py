"""megatron_llmjp: 3D-parallel pretraining on megatron-core, from raw text to a published model."""

__version__ = "0.1.0"
