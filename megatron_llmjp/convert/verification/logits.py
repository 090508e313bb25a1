"""Logits of Hugging Face folders and native checkpoints, computed without the converter.

Native checkpoints are computed in a separate process on the CPU: megatron-core requires a process
group, and the CPU substitution of ``parallel.device`` must not affect transformers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.errors import UserError


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
        source.path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
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
    from megatron_llmjp.inference.native_model import load_native_model

    model = load_native_model(folder, "fp32")
    with torch.no_grad():
        if dtype is not None:
            for parameter in model.module.parameters():
                parameter.copy_(parameter.to(dtype).float())
    return model.logits(torch.from_numpy(tokens)).float().numpy()
