"""Checkpoints: contents, saving, loading, retention, resume."""
