"""Training: setup, loop, step, optimizer, gradient monitor, hang detection, metrics."""
