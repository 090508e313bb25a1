"""Helpers shared by tests: small datasets, processes, training runs, comparisons."""
