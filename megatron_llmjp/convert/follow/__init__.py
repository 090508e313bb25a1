"""Conversion of the checkpoints of a running run, as they appear."""
