"""Writer of Megatron-LM's format ``torch``: one file per tensor and pipeline rank.

A rank's file has one model per chunk (``model``, or ``model0``, ``model1``, ... with virtual
stages), whose layers are numbered within the chunk (megatron/training/checkpointing.py,
``generate_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import folder_name
from megatron_llmjp.config.pipeline_layout import ModelChunk
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.megatron_lm.pipeline_arguments import target_chunks
from megatron_llmjp.convert.formats.megatron_lm.reader import FILE, TRACKER
from megatron_llmjp.convert.formats.megatron_lm.written_arguments import checkpoint_arguments
from megatron_llmjp.convert.formats.rank_files import (
    rank_shape,
    rank_write,
    target_padded_vocab_size,
)
from megatron_llmjp.convert.plan import OutputFile, OutputPlan, Slot
from megatron_llmjp.convert.tensors import (
    LAYER,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    is_linear,
    tensor_shapes,
)
from megatron_llmjp.filesystem import write_atomically


def iteration_folder(iteration: int) -> str:
    """Return the folder name; Megatron-LM does not load iteration 0, but a ``release``."""
    return folder_name(iteration) if iteration else "release"


def write_tracker(out: Path, iteration: int) -> None:
    """Write the file that names the iteration to load."""
    write_atomically(out / TRACKER, str(iteration) if iteration else "release")


def plan_legacy(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out one file per rank.

    Raises:
        UserError: the layers cannot be divided over the stages.
    """
    model, tensor = source.model, options.tensor_parallel
    rows = target_padded_vocab_size(model, source.padded_vocab_size, tensor)
    iteration = source.iteration or 0
    stages = target_chunks(model, options)
    files = []
    slots: dict[str, dict[int, list[Slot]]] = {}
    for t in range(tensor):
        for p, chunks in enumerate(stages):
            rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if len(stages) > 1 else "")
            path = f"{iteration_folder(iteration)}/{rank}/{FILE}"
            file, names = _rank_file(path, source, options, chunks, rows)
            files.append(file)
            for key, name in names.items():
                slots.setdefault(name, {}).setdefault(t, []).append(file.slots[key])
    writes = {name: rank_write(name, model, tensor, own, rows) for name, own in slots.items()}
    return OutputPlan(files, writes, lambda out, _: write_tracker(out, iteration))


def _rank_file(
    path: str,
    source: SourceCheckpoint,
    options: ConversionOptions,
    chunks: tuple[ModelChunk, ...],
    rows: int,
) -> tuple[OutputFile, dict[str, str]]:
    """Lay out the file of one rank; returns the canonical names by key of the slots, too."""
    shapes = tensor_shapes(source.model, rows)
    content = {
        "args": checkpoint_arguments(source, options, rows),
        "checkpoint_version": 3.0,
        "iteration": source.iteration or 0,
    }
    names = {}
    for number, chunk in enumerate(chunks):
        root = "model" if len(chunks) == 1 else f"model{number}"
        tree = {}
        for key, name in chunk_keys(chunk, source.model, options.transformer_impl):
            shape = rank_shape(name, source.model, shapes[name], options.tensor_parallel)
            dtype = options.dtype_of(source.reads[name])
            tree[key] = TensorPlaceholder(f"{root}.{key}", shape, dtype)
            names[f"{root}.{key}"] = name
        content[root] = _with_extra_states(tree, options)
    return plan_archive(path, content), names


def chunk_keys(
    chunk: ModelChunk, model: ModelConfig, transformer_impl: str
) -> Iterator[tuple[str, str]]:
    """Yield key and canonical name of every tensor of a model chunk, in the model's order."""
    for name in tensor_shapes(model, 1):
        match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match:
            local = int(match[1]) - chunk.first_layer
            if 0 <= local < chunk.layers:
                key = _key_in_layer(match[2], transformer_impl, model.expert_layers[int(match[1])])
                yield LAYER.format(i=local) + key, name
        elif chunk.embedding if name.startswith("embedding.") else chunk.output:
            yield name, name
    if chunk.output and not chunk.embedding and not model.untie_embeddings_and_output_weights:
        yield OUTPUT_LAYER, WORD_EMBEDDINGS


def _key_in_layer(inner: str, transformer_impl: str, has_experts: bool) -> str:
    """Return the key relative to its layer; the norm before experts is a module of its own."""
    if transformer_impl == "transformer_engine":
        for plain, fused in mcore_names.FUSED_NORMS.items():
            if not (has_experts and plain == "pre_mlp_layernorm."):
                inner = inner.replace(plain, fused)
    return inner


def _with_extra_states(tree: dict[str, Any], options: ConversionOptions) -> dict[str, Any]:
    """Add the empty extra states of linear layers, and of Transformer Engine's norms."""
    has_norms = options.transformer_impl == "transformer_engine"
    found: dict[str, Any] = {}
    for key, placeholder in tree.items():
        found[key] = placeholder
        if is_linear(key) or (has_norms and key.endswith("layernorm.weight")):
            found[key.removesuffix("weight") + "_extra_state"] = None
    return found
