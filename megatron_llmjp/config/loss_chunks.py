"""Size of the chunks of tokens in which the losses are computed."""

from __future__ import annotations

GPU_CHUNK_BYTES = 2**28
"""Few kernels per step."""
CPU_CHUNK_BYTES = 2**22
"""About the size of a cache."""


def loss_chunk_tokens(tokens: int, vocabulary: int, gpu: bool) -> int:
    """Return the number of tokens of a chunk, whose logits are converted to fp32 together.

    Args:
        tokens: number of tokens of a micro-batch.
        vocabulary: padded vocabulary size on one tensor-parallel rank.
        gpu: whether the logits are on a GPU.

    Returns:
        All tokens, or a power of two of them.
    """
    fitting = max(1, (GPU_CHUNK_BYTES if gpu else CPU_CHUNK_BYTES) // (4 * vocabulary))
    return tokens if tokens <= fitting else 1 << (fitting.bit_length() - 1)
