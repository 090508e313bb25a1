"""Sample indices: built once, cached on disk, shared by all processes."""
