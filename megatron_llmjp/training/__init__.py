"""The run itself: the loop, one step, the optimizer, validation and the log."""
