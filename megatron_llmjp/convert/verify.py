"""``--verify``: both sides of a conversion compute logits of the same tokens, and are compared.

Each side is read a second time by a program that shares no name, no layout and no derived field
with the converter: Hugging Face folders by transformers from their own config.json, native
checkpoints by the trainer and megatron-core from their own config.yaml, Megatron's by
:mod:`reference` from their own arguments. A mistake in the converter's tables would have to be
made a second time there to go unseen. Arithmetic is fp32 on both; weights that one side has in 16
bits are rounded on the other alike, since the question is whether the meaning was kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
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
        stored = open_source(source.format, source.path, _only_reading(options)).dtype
        before = _logits(source, tokens, _narrow(target.dtype), options.ignored_args)
        after = _logits(target, tokens, _narrow(stored), frozenset())
        print(f"verify: source: {_program(source)}\nverify: result: {_program(target)}")
        if options.with_optimizer:
            print("verify: the optimizer's state is not part of the comparison")
        _compare(before[..., :vocabulary], after[..., :vocabulary], tokens, tolerance)

    return verify


def _only_reading(options: Options) -> Options:
    return Options(ignored_args=options.ignored_args)


def _narrow(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype.itemsize == 2 else None


def _program(source: Source) -> str:
    """Who computed a side, and from what."""
    files = {
        "hf": "transformers {transformers}, from config.json and the weights' own names",
        "native": "megatron-core {megatron-core}, loaded as a run loads it, from config.yaml",
    }
    other = "plain PyTorch {torch}, from the run's args and each rank's tensors as they are stored"
    text = files.get(source.format, other)
    names = re.findall(r"{(.*?)}", text)
    return text.format_map({name: version(name) for name in names})


def _tokens(source: Source, vocabulary: int) -> torch.Tensor:
    """Random tokens ``[batch, length + 1]``, the same every time."""
    batch, length = TOKENS
    length = min(length, (source.model.max_position_embeddings or length))
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(vocabulary, (batch, length + 1), generator=generator)


def _logits(
    source: Source, tokens: torch.Tensor, dtype: torch.dtype | None, ignored: frozenset[str]
) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of the tokens but the last."""
    from megatron_llmjp.convert import forward_hf, forward_megatron, reference

    inputs = tokens[:, :-1]
    if source.format == "hf":
        return forward_hf.logits(source, inputs, dtype)
    if source.format == "native":
        return forward_megatron.logits(source, inputs, dtype)
    return reference.logits(source, inputs, dtype, ignored)


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
