"""``--verify``: logits of both sides of a conversion for the same tokens, compared.

Logits of a Hugging Face folder, computed by transformers.

Logits of a native checkpoint, computed by megatron-core with what a run loads.

The model runs in a process of its own, on the CPU: megatron-core wants a process group, and the
CPU substitution of ``parallel.device`` must not reach transformers.

``--verify``: both sides of a conversion compute logits of the same tokens, and are compared.

Each side is read a second time by a program that shares no name, no layout and no derived field
with the converter: Hugging Face folders by transformers from their own config.json, native
checkpoints by the trainer and megatron-core from their own config.yaml, Megatron's by
:mod:`reference` from their own arguments. A mistake in the converter's tables would have to be
made a second time there to go unseen. Arithmetic is fp32 on both; weights that one side has in 16
bits are rounded on the other alike, since the question is whether the meaning was kept.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_llmjp.checkpoint.manifest import CONFIG
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.convert.conversion import Conversion, VerificationError, open_checkpoint
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.registry import FORMATS, Verification
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def hugging_face_logits(
    source: SourceCheckpoint, tokens: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of tokens ``[batch, length]``.

    Args:
        source: the folder.
        tokens: the input.
        dtype: round the weights to this type first.

    Raises:
        UserError: transformers is not installed, or did not find every tensor.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("--verify needs transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: keys for kind, keys in report.items() if keys and "keys" in kind}
    if wrong:
        raise UserError(f"{source.path}: transformers reports {wrong}")
    if dtype is not None:
        for parameter in model.parameters():  # not .to(): it would round the rotary table as well
            parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens).logits
    return result


def native_logits(
    source: SourceCheckpoint, tokens: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of tokens ``[batch, length]``.

    Args:
        source: names the folder; its derived fields are not looked at.
        tokens: the input.
        dtype: round the weights to this type first.
    """
    with _without_gpus(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(_forward, source.path, tokens.numpy(), dtype).result()
    return torch.from_numpy(result)


@contextmanager
def _without_gpus() -> Iterator[None]:
    """Hide the GPUs from processes started inside: fp32 on a GPU is not the same arithmetic."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _forward(folder: Path, tokens: Any, dtype: torch.dtype | None) -> Any:
    # megatron-core's advice on deprecations and generators is for trainers.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron_llmjp.model.gpt import build_model_chunk
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process

    config = _config(folder)
    device = setup()
    process_groups.initialize(config, single_process(), device)
    try:
        model = build_model_chunk(config, device).eval()
        _load(model, folder)
        inputs = torch.from_numpy(tokens)
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        with torch.no_grad():
            if dtype is not None:
                for parameter in model.parameters():
                    parameter.copy_(parameter.to(dtype).float())
            result: torch.Tensor = model(inputs, positions, None)
        return result.float().numpy()
    finally:
        process_groups.destroy()


def _config(folder: Path) -> Config:
    """The model of a checkpoint's own configuration in fp32, in one process."""
    stored = load_config(folder / CONFIG)
    model = stored.model.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    data = {"seq_length": stored.data.seq_length}
    return Config.model_validate({"model": model.model_dump(), "data": data})


def _load(model: GPTModel, folder: Path) -> None:
    """Fill the model by the trainer's own loader; what is not loaded is not a number."""
    from megatron_llmjp.checkpoint import sharded_state

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    sharded_state.load_checkpoint(folder, sharded_state.RunState([model]))


TOKENS_SHAPE = (2, 128)
"""Batch and length of the compared tokens."""


def make_verifier(
    conversion: Conversion, options: ConversionOptions, tolerance: float
) -> Callable[[Path], None]:
    """The check of a finished output folder.

    Args:
        conversion: what was converted.
        options: what was asked for.
        tolerance: largest logit difference, relative to the largest logit.

    Returns:
        A function that prints the figures and raises :class:`VerificationError` beyond the
        tolerance.
    """

    for name in (conversion.source.format, conversion.target):
        _verification(name)

    def verify(folder: Path) -> None:
        source = conversion.source
        target = open_checkpoint(conversion.target, folder, ConversionOptions()).check()
        vocabulary = source.model.vocab_size or min(
            source.padded_vocab_size, target.padded_vocab_size
        )
        tokens = _tokens(source, vocabulary)
        stored = open_checkpoint(source.format, source.path, _only_reading(options)).dtype
        before = _logits(source, tokens, _narrow(target.dtype), options.ignored_args)
        after = _logits(target, tokens, _narrow(stored), frozenset())
        print(f"verify: source: {_program(source)}\nverify: result: {_program(target)}")
        if options.with_optimizer:
            print("verify: the optimizer's state is not part of the comparison")
        _compare(before[..., :vocabulary], after[..., :vocabulary], tokens, tolerance)

    return verify


def _only_reading(options: ConversionOptions) -> ConversionOptions:
    return ConversionOptions(ignored_args=options.ignored_args)


def _narrow(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype.itemsize == 2 else None


def _program(source: SourceCheckpoint) -> str:
    """Who computed a side, and from what."""
    text = _verification(source.format).program
    names = re.findall(r"{(.*?)}", text)
    return text.format_map({name: version(name) for name in names})


def _tokens(source: SourceCheckpoint, vocabulary: int) -> torch.Tensor:
    """Random tokens ``[batch, length + 1]``, the same every time."""
    batch, length = TOKENS_SHAPE
    length = min(length, (source.model.max_position_embeddings or length))
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(vocabulary, (batch, length + 1), generator=generator)


def _logits(
    source: SourceCheckpoint,
    tokens: torch.Tensor,
    dtype: torch.dtype | None,
    ignored: frozenset[str],
) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of the tokens but the last."""
    return _verification(source.format).logits(source, tokens[:, :-1], dtype, ignored)


def _verification(format_name: str) -> Verification:
    """Return the entry of a format.

    Raises:
        UserError: the format cannot be verified.
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
    if not relative <= tolerance:  # not-a-number fails as well
        raise VerificationError(
            f"--verify: logits differ by {relative:.2e} of the largest, {tolerance:.1e} is allowed"
        )


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean cross entropy over the true vocabulary."""
    labels = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels).item()
