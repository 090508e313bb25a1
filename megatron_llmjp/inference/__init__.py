"""Models in one process, loaded from native checkpoints of any parallel layout."""
