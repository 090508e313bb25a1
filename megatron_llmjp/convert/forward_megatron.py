"""Logits of a native, Megatron-LM or Megatron-DeepSpeed checkpoint, computed by megatron-core.

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
from dataclasses import replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from megatron_llmjp.config.schema import Config
from megatron_llmjp.convert.formats import Source

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def logits(source: Source, tokens: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of tokens ``[batch, length]``.

    Args:
        source: an opened checkpoint.
        tokens: the input.
        dtype: round the weights to this type first.
    """
    with _without_gpus(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        plain = replace(source, optimizer=None)  # what opens it cannot be sent
        result = pool.submit(_forward, plain, tokens.numpy(), dtype).result()
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


def _forward(source: Source, tokens: Any, dtype: torch.dtype | None) -> Any:
    # megatron-core's advice on deprecations and generators is for trainers.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron_llmjp.model.gpt import build_model_chunk
    from megatron_llmjp.runtime import distributed
    from megatron_llmjp.runtime.device import setup
    from megatron_llmjp.runtime.ranks import alone

    config = _config(source)
    device = setup()
    distributed.start(config, alone(), device)
    try:
        model = build_model_chunk(config, device).eval()
        _load(model, source)
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


def _config(source: Source) -> Config:
    """The source's model in fp32, in one process."""
    positions = source.model.max_position_embeddings
    model = source.model.model_copy(
        update={
            "vocab_size": source.model.vocab_size or source.rows,
            "padded_vocab_size": source.rows,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
    )
    return Config.model_validate({"model": model.model_dump(), "data": {"seq_length": positions}})


def _load(model: GPTModel, source: Source) -> None:
    """Fill the model: native by the trainer's own loader, others from the canonical stream."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what is not loaded must show
    if source.format == "native":
        from megatron_llmjp.checkpoint import store

        store.load(source.path, store.RunState([model]))
        return
    parameters = dict(model.named_parameters())
    if parameters.keys() != source.reads.keys():
        odd = sorted(parameters.keys() ^ source.reads.keys())
        raise ValueError(f"megatron-core's model and the canonical names differ: {odd[:5]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(source.reads[name].read(name))
