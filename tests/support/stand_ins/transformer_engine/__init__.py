"""Stand-in of Transformer Engine 2.20.2 for tests: its names and signatures, computed by torch.

It shows that names, keyword arguments, parameter names, extra states and the parallel layout fit
between megatron-core, this program and Transformer Engine. It shows nothing about the numbers of
Transformer Engine's kernels, which need a GPU.

Own code; only names are those of the original. ``tests/model/test_transformer_engine_names.py``
compares them with ``tests/support/transformer_engine_names.json``.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "has_gpu", "pytorch"]
__version__ = "2.20.2"
has_gpu = False
"""Whether kernels run: a test sets it; otherwise they fail, as those of the original on a CPU."""
