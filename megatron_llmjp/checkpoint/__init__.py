"""The run at rest: what a checkpoint holds, and how it is written and read."""
