"""Optimizer state and random states of checkpoints."""
