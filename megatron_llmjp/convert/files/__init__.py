"""Readers and writers of file formats: safetensors, torch archives, torch_dist; checksums."""
