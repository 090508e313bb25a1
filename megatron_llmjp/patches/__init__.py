"""Every change to torch and megatron-core at run time, with its reason."""
