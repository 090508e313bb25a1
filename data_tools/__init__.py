"""Command-line programs for data and runs; each program's module has a ``main`` function."""
