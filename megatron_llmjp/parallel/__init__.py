"""Processes of a run: device, ranks, process groups, local launcher, signals."""
