"""Job scripts, and what they call."""
