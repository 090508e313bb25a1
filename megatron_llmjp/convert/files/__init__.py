"""File formats: safetensors, torch archives, torch_dist; storage of tensors and checksums."""
