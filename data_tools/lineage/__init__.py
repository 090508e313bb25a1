"""Reports on the training data of a run: ``inspect_dataset --run``."""
