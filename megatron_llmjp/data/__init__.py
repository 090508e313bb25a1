"""Training data: indexed datasets, the fold schedule, sample indices and the data loader."""
