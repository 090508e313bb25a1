"""Step time of a run by term, GPUs, and corrections by measured runs."""
