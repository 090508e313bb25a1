"""Logits of a native checkpoint, computed by megatron-core with what a run loads.

The model runs in a process of its own, on the CPU: megatron-core wants a process group, and the
CPU substitution of ``runtime.device`` must not reach transformers.
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
from typing import TYPE_CHECKING, Any

import torch

from megatron_llmjp.checkpoint.manifest import CONFIG
from megatron_llmjp.config.load import load_resolved
from megatron_llmjp.config.schema import Config
from megatron_llmjp.convert.formats import Source

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def logits(source: Source, tokens: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
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
    from megatron_llmjp.runtime import distributed
    from megatron_llmjp.runtime.device import setup
    from megatron_llmjp.runtime.ranks import alone

    config = _config(folder)
    device = setup()
    distributed.start(config, alone(), device)
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
        distributed.stop()


def _config(folder: Path) -> Config:
    """The model of a checkpoint's own configuration in fp32, in one process."""
    stored = load_resolved(folder / CONFIG)
    model = stored.model.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    data = {"seq_length": stored.data.seq_length}
    return Config.model_validate({"model": model.model_dump(), "data": data})


def _load(model: GPTModel, folder: Path) -> None:
    """Fill the model by the trainer's own loader; what is not loaded is not a number."""
    from megatron_llmjp.checkpoint import store

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    store.load(folder, store.RunState([model]))
