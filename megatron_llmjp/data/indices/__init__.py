"""Sample indices: built once, cached on disk and shared by all processes."""
