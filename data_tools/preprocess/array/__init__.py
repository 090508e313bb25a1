"""Parts of the input that the tasks of a Slurm array process, their status and their merging."""
