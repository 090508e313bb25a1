"""What a run did, read from what it wrote: no torch, and nothing of the run is touched."""
