"""The network: a megatron-core GPTModel built from the configuration."""
