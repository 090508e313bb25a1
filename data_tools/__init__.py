"""Command line programs on data; each module named like a program holds its ``main``."""
