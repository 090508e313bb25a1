"""Synthetic data, and training runs in the process of a part."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.results import Context
from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.parallel import process_groups
from megatron_llmjp.parallel.device import Device, setup_rank
from megatron_llmjp.parallel.ranks import single_process
from megatron_llmjp.run import Run, resolve_run


def synthetic_data(folder: Path, vocab_size: int, tokens: int, document: int) -> Path:
    """Write a dataset of random tokens, unless it exists, and return its path without suffix.

    A token is one to three above the previous one, so that small models learn something; documents
    of random lengths, ``document`` tokens on average, end with the last id, the end of document of
    NullTokenizer.
    """
    prefix = folder / f"synthetic_{vocab_size}_{tokens}_{document}"
    if prefix.with_suffix(".idx").exists():
        return prefix
    generator = np.random.default_rng(vocab_size)
    lengths = generator.integers(2, 2 * document, 1 + tokens // document)
    stream = np.cumsum(generator.integers(1, 4, lengths.sum())) % (vocab_size - 1)
    stream[np.cumsum(lengths) - 1] = vocab_size - 1
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), dtype)
    writer.add(stream.astype(dtype), lengths.astype(np.int32))
    writer.finish(prefix.with_suffix(".idx"))
    writer.clean()
    return prefix


def run_flags(
    context: Context, preset: str, *flags: str, tokens: int, document: int = 600
) -> list[str]:
    """Return the command line of a run of a preset on synthetic data.

    Later flags override earlier ones. The vocabulary is the preset's, or that of ``--vocab-size``
    in ``flags``.
    """
    words = ["--config", preset, *flags, "--device", context.device]
    words += ["--tokenizer-type", "NullTokenizer"]
    words += ["--log-interval", "1", "--eval-iters", "0"]
    vocab_size = parse(words).config.model.vocab_size
    assert vocab_size is not None, f"{preset} has no vocabulary size: pass --vocab-size"
    data = synthetic_data(context.work, vocab_size, tokens, document)
    return [*words, "--vocab-size", str(vocab_size), "--data-path", str(data), "--split", "1,0,0"]


def installed_layers(context: Context) -> tuple[str, ...]:
    """Return the layers that can be measured: ``torch`` and, on a GPU, ``TE``."""
    with_te = context.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    return ("torch", "TE") if with_te else ("torch",)


def layer_flags(layers: str) -> list[str]:
    """Return the flags that select torch's layers or Transformer Engine's."""
    return ["--transformer-impl", {"torch": "local", "TE": "transformer_engine"}[layers]]


def resolve(words: Sequence[str]) -> tuple[Run, Device]:
    """Resolve the run of one process, and select its device."""
    run = resolve_run(parse(list(words)).config, 1)
    return run, setup_rank(run.config.parallel.device, 0)


def train(words: Sequence[str]) -> int:
    """Train in this process as pretrain_gpt.py does; return its exit code."""
    from megatron_llmjp.training.train import train as train_run

    run, device = resolve(words)
    try:
        return train_run(run, single_process(), device)
    finally:
        process_groups.destroy()
        gc.collect()  # the next run needs the memory of the model
        torch.cuda.empty_cache()


def losses(save: Path) -> list[float]:
    """Return the loss of each iteration of a run, in order."""
    records = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    by_iteration = {r["iteration"]: r["lm loss"] for r in records if "lm loss" in r}
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]
