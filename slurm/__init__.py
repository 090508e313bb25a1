"""Slurm and PBS job scripts, and the programs that they call."""
