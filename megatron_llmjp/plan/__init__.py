"""A run on paper: what it computes, holds, sends and needs, worked out without running it."""
