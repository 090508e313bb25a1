"""``--verify``: both sides of a conversion compute logits of the same tokens, and are compared.

Each side runs in its own program: transformers for Hugging Face, megatron-core through this
project's own model for the other formats. Arithmetic is fp32 on both; where ``--dtype`` rounded the
weights, those of the source are rounded alike, since the question is whether the meaning was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_llmjp.convert.convert import Conversion, Difference, open_source
from megatron_llmjp.convert.formats import Options, Source

TOKENS = (2, 128)
"""Batch and length of the compared tokens."""


def verifier(conversion: Conversion, options: Options, tolerance: float) -> Callable[[Path], None]:
    """The check of a finished output folder.

    Args:
        conversion: what was converted.
        options: what was asked for.
        tolerance: largest logit difference, relative to the largest logit.

    Returns:
        A function that prints the figures and raises :class:`Difference` beyond the tolerance.
    """

    def verify(folder: Path) -> None:
        source = conversion.source
        target = open_source(conversion.target, folder, Options()).check()
        vocabulary = source.model.vocab_size or min(source.rows, target.rows)
        tokens = _tokens(source, vocabulary)
        before = _logits(source, tokens, options.dtype)[..., :vocabulary]
        after = _logits(target, tokens, None)[..., :vocabulary]
        _compare(before, after, tokens, tolerance)

    return verify


def _tokens(source: Source, vocabulary: int) -> torch.Tensor:
    """Random tokens ``[batch, length + 1]``, the same every time."""
    batch, length = TOKENS
    length = min(length, (source.model.max_position_embeddings or length))
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(vocabulary, (batch, length + 1), generator=generator)


def _logits(source: Source, tokens: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of the tokens but the last."""
    from megatron_llmjp.convert import forward_hf, forward_megatron

    forward = forward_hf if source.format == "hf" else forward_megatron
    return forward.logits(source, tokens[:, :-1], dtype)


def _compare(
    before: torch.Tensor, after: torch.Tensor, tokens: torch.Tensor, tolerance: float
) -> None:
    largest = (before - after).abs().max().item()
    scale = before.abs().max().item()
    relative = largest / max(scale, 1e-30)
    print(
        f"verify: {tokens.shape[0]} x {tokens.shape[1] - 1} tokens in fp32: "
        f"largest logit difference {largest:.3e} of logits up to {scale:.3e}; "
        f"loss {_loss(before, tokens):.6f} before, {_loss(after, tokens):.6f} after"
    )
    if not relative <= tolerance:  # not-a-number fails as well
        raise Difference(
            f"--verify: logits differ by {relative:.2e} of the largest, {tolerance:.1e} is allowed"
        )


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean cross entropy over the true vocabulary."""
    labels = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels).item()
