"""What a run is: typed sections, read from preset, file and command line, and checked."""
