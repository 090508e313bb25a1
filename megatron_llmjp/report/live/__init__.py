"""Live view of runs in a terminal: samples of the loss, sparklines, the screen."""
