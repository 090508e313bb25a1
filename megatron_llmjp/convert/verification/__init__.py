"""Comparison of checkpoints: logits of source and output, tensors, architectures."""
