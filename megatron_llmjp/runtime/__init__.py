"""Where a run lives: the device, the processes and their groups."""
