"""Checkpoints of Megatron-LM: legacy ``torch`` and ``torch_dist``."""
