"""Architectures of Hugging Face models, one per file, and what several of them share."""
