"""Processes of a run: device, ranks, process groups, launcher, signals."""
