"""Estimates of a run computed from its configuration: data, memory, communication, FLOPs, days."""
