"""Stand-in of Transformer Engine's compiled extension, of which megatron-core calls nothing."""
