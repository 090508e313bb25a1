"""Source of each document of a dataset: file, line, byte offset and its own id."""
