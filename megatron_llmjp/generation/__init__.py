"""Text generation from native checkpoints: sampling, decoding loop, prompts, requests."""
