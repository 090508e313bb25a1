"""Preflight check of the nodes of a job: hardware, network, disk, and which node is at fault."""
