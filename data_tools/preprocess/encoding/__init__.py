"""Encoding of texts to token arrays in worker processes, and samples of the corpus."""
