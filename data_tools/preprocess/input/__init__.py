"""Input files, local or remote, plain or compressed, cut into parts and read in blocks."""
