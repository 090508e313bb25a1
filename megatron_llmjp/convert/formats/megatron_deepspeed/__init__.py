"""Checkpoints of Megatron-DeepSpeed, with ZeRO optimizer state."""
