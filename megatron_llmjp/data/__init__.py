"""Tokens in: indexed datasets, the fold schedule, samples and batches."""
