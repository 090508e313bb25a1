"""Copying of tensors from file to file: blocks, threads, tasks, output folder."""
