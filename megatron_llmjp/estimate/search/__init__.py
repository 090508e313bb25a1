"""Search over parallel layouts and numbers of GPUs."""
