"""Verification of conversions (``--verify``): compares the logits of source and output.

Each side is computed by a program that shares no name, no layout and no derived field with the
converter: Hugging Face folders by transformers from their config.json, native checkpoints by the
trainer and megatron-core from their config.yaml, Megatron checkpoints by :mod:`reference` from
their arguments. An error in the converter's tables is therefore not repeated in the verification.
Both sides compute in fp32. If one side has 16-bit weights, the other side's weights are rounded to
the same type first, so that rounding by ``--dtype`` is not reported as a difference.

Native checkpoints are computed in a separate process on the CPU: megatron-core requires a process
group, and the CPU substitution of ``parallel.device`` must not affect transformers.
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


TOKENS_SHAPE = (2, 128)
"""Batch size and length of the compared tokens."""


def hugging_face_logits(
    source: SourceCheckpoint, tokens: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """Compute fp32 logits ``[batch, length, padded vocabulary]`` of tokens ``[batch, length]``.

    Args:
        source: checkpoint; only its path is used.
        tokens: input token ids.
        dtype: type to round the weights to before computing in fp32.

    Raises:
        UserError: transformers is not installed, or reports missing or unexpected tensors.
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
    """Compute fp32 logits ``[batch, length, padded vocabulary]`` of tokens ``[batch, length]``.

    Args:
        source: checkpoint; only its path is used.
        tokens: input token ids.
        dtype: type to round the weights to before computing in fp32.
    """
    with _without_gpus(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(_native_forward, source.path, tokens.numpy(), dtype).result()
    return torch.from_numpy(result)


@contextmanager
def _without_gpus() -> Iterator[None]:
    """Hide the GPUs from processes started in the block: fp32 arithmetic differs on GPUs."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _native_forward(folder: Path, tokens: Any, dtype: torch.dtype | None) -> Any:
    # megatron-core's warnings on deprecations and random generators do not apply here.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron_llmjp.model.gpt import build_model_chunk
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process

    config = _fp32_config(folder)
    device = setup()
    process_groups.initialize(config, single_process(), device)
    try:
        model = build_model_chunk(config, device).eval()
        _load_weights(model, folder)
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


def _fp32_config(folder: Path) -> Config:
    """Return the configuration of a checkpoint's model in fp32, for one process."""
    stored = load_config(folder / CONFIG)
    model = stored.model.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    data = {"seq_length": stored.data.seq_length}
    return Config.model_validate({"model": model.model_dump(), "data": data})


def _load_weights(model: GPTModel, folder: Path) -> None:
    """Load the model with the trainer's loader; weights that are not loaded stay NaN."""
    from megatron_llmjp.checkpoint import sharded_state

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    sharded_state.load_checkpoint(folder, sharded_state.RunState([model]))


def make_verifier(
    conversion: Conversion, options: ConversionOptions, tolerance: float
) -> Callable[[Path], None]:
    """Return a function that verifies a complete output folder.

    Args:
        conversion: the conversion.
        options: the user's options.
        tolerance: maximum logit difference, relative to the largest logit.

    Returns:
        A function that prints the results; it raises :class:`VerificationError` if the difference
        is larger than the tolerance.

    Raises:
        UserError: one of the formats does not support ``--verify``.
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
        stored = open_checkpoint(source.format, source.path, _reader_options(options)).dtype
        before = _logits(source, tokens, _sixteen_bit_type(target.dtype), options.ignored_args)
        after = _logits(target, tokens, _sixteen_bit_type(stored), frozenset())
        print(f"verify: source: {_program(source)}\nverify: result: {_program(target)}")
        if options.with_optimizer:
            print("verify: the optimizer state is not compared")
        _compare(before[..., :vocabulary], after[..., :vocabulary], tokens, tolerance)

    return verify


def _reader_options(options: ConversionOptions) -> ConversionOptions:
    return ConversionOptions(ignored_args=options.ignored_args)


def _sixteen_bit_type(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype.itemsize == 2 else None


def _program(source: SourceCheckpoint) -> str:
    """Return which program computed the logits of a checkpoint, and from which files."""
    text = _verification(source.format).program
    names = re.findall(r"{(.*?)}", text)
    return text.format_map({name: version(name) for name in names})


def _tokens(source: SourceCheckpoint, vocabulary: int) -> torch.Tensor:
    """Return random tokens ``[batch, length + 1]`` with a fixed seed."""
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
