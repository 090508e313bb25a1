"""Alerts on the events of a run, to a webhook or a command; without torch."""
