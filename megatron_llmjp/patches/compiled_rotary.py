"""Compilation of megatron-core's rotary position embedding for GPUs without Transformer Engine.

What: ``_apply_rotary_pos_emb_bshd`` of ``megatron.core.models.common.embeddings.rope_utils``
becomes ``torch.compile`` of itself.

Why: without Transformer Engine ``apply_rope_fusion`` is not available, and each of some ten
operations on queries and keys is a kernel of its own that reads and writes the whole tensor; the
cosines and sines are kept for the backward pass by every layer. Transformer Engine's kernel does
not support YaRN's factor on them (``mscale``), so that YaRN needs this function with it, too.
Liger-Kernel's kernel takes another layout (batch first), for which queries would be copied.

Remove when ``rope_utils`` compiles the function with ``jit_fuser`` as megatron-core's other fused
functions. Not the case in megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

NAME = "_apply_rotary_pos_emb_bshd"


def compile_rotary_embedding() -> None:
    """Make megatron-core rotate queries and keys in one kernel. Calling it again does nothing."""
    function: Any = getattr(rope_utils, NAME)
    if not hasattr(function, "_torchdynamo_orig_callable"):
        setattr(rope_utils, NAME, torch.compile(function, dynamic=False))
