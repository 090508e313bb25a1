"""Verification of conversions (``--verify``): compares the logits of source and output.

Each side is computed by a program that shares no name, no layout and no derived field with the
converter: Hugging Face folders by transformers from their config.json, native checkpoints by the
trainer and megatron-core from their config.yaml, Megatron checkpoints by :mod:`reference` from
their arguments. An error in the converter's tables is therefore not repeated in the verification.
Both sides compute in fp32. If one side has 16-bit weights, the other side's weights are rounded to
the same type first, so that rounding by ``--dtype`` is not reported as a difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_llmjp.config.model_config import ModelConfig
from megatron_llmjp.convert.conversion import Conversion, VerificationError
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.registry import FORMATS, Verification
from megatron_llmjp.convert.opening import open_checkpoint
from megatron_llmjp.errors import UserError

TOKENS_SHAPE = (2, 128)
"""Batch size and length of the compared tokens."""


def make_verifier(
    conversion: Conversion,
    options: ConversionOptions,
    tolerance: float,
    length: int | None = None,
) -> Callable[[Path], None]:
    """Return a function that verifies a complete output folder.

    Args:
        conversion: the conversion.
        options: the user's options.
        tolerance: maximum logit difference, relative to the largest logit.
        length: number of tokens of one compared sequence; None for :data:`TOKENS_SHAPE`.

    Returns:
        A function that prints the results; it raises :class:`VerificationError` if the difference
        is larger than the tolerance.

    Raises:
        UserError: one of the formats does not support ``--verify``, or ``length`` is not one of
            the model.
    """
    positions = conversion.source.model.max_position_embeddings
    if length is not None and not 0 < length <= (positions or length):
        raise UserError(
            f"--verify-length {length}: expected 1 to max_position_embeddings {positions} of "
            f"{conversion.source.path}"
        )
    for name in (conversion.source.format, conversion.target):
        _verification(name)

    def verify(folder: Path) -> None:
        source = conversion.source
        target = open_checkpoint(conversion.target, folder, ConversionOptions()).check()
        vocabulary = source.model.vocab_size or min(
            source.padded_vocab_size, target.padded_vocab_size
        )
        tokens = _tokens(source, vocabulary, length)
        stored = open_checkpoint(source.format, source.path, _reader_options(options)).dtype
        before = _logits(source, tokens, _sixteen_bit_type(target.dtype), options.ignored_args)
        after = _logits(target, tokens, _sixteen_bit_type(stored), frozenset())
        print(f"verify: source: {_program(source)}\nverify: result: {_program(target)}")
        if options.with_optimizer:
            print("verify: the optimizer state is not compared")
        _compare(before[..., :vocabulary], after[..., :vocabulary], tokens, tolerance)
        if original := _length_beyond(source.model, tokens.shape[1] - 1):
            print(
                f"verify: all positions are below {original}, the length from which the rotary "
                "frequencies are scaled: --verify-length compares longer sequences"
            )

    return verify


def _reader_options(options: ConversionOptions) -> ConversionOptions:
    return ConversionOptions(ignored_args=options.ignored_args)


def _sixteen_bit_type(dtype: DType) -> torch.dtype | None:
    return dtype.torch if dtype.itemsize == 2 else None


def _program(source: SourceCheckpoint) -> str:
    """Return which program computed the logits of a checkpoint, and from which files."""
    text = _verification(source.format).program
    names = re.findall(r"{(.*?)}", text)
    return text.format_map({name: version(name) for name in names})


def _length_beyond(model: ModelConfig, length: int) -> int | None:
    """Return the original length of scaled rotary frequencies if it is not below ``length``."""
    original = None
    if model.position_embedding_type == "yarn":
        original = model.yarn_original_max_position_embeddings
    elif model.use_rope_scaling:
        original = model.rope_scaling_original_max_position_embeddings
    return original if original is not None and length <= original else None


def _tokens(source: SourceCheckpoint, vocabulary: int, requested: int | None) -> torch.Tensor:
    """Return random tokens ``[batch, length + 1]`` with a fixed seed."""
    batch, length = TOKENS_SHAPE if requested is None else (1, requested)
    length = min(length, (source.model.max_position_embeddings or length))
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(vocabulary, (batch, length + 1), generator=generator)


def _logits(
    source: SourceCheckpoint,
    tokens: torch.Tensor,
    dtype: torch.dtype | None,
    ignored: frozenset[str],
) -> torch.Tensor:
    """Compute fp32 logits ``[batch, length, padded vocabulary]`` of all tokens except the last."""
    return _verification(source.format).logits(source, tokens[:, :-1], dtype, ignored)


def _verification(format_name: str) -> Verification:
    """Return the verification of a format.

    Raises:
        UserError: the format does not support ``--verify``.
    """
    found = FORMATS[format_name].verification
    if found is None:
        raise UserError(f"--verify: not supported for {format_name}")
    return found


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
    if not relative <= tolerance:  # also true for NaN
        raise VerificationError(
            f"--verify: logits differ by {relative:.2e} of the largest, {tolerance:.1e} is allowed"
        )


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the mean cross entropy over the vocabulary without padding."""
    labels = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels).item()
