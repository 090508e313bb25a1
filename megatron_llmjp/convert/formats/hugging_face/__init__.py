"""Hugging Face models: a folder with config.json, safetensors files and a tokenizer."""
