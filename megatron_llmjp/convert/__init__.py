"""Checkpoints between formats: named tensors go from a reader to a writer, one at a time."""
