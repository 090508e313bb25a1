"""Tensor names in megatron-core's distributed checkpoints, native ones and Megatron-LM's.

Layers are stacked, ``[layers, ...]``, under one key without the layer index, and norms have the
names of Transformer Engine's fused layers, whichever layers were trained
(megatron/core/models/gpt/gpt_layer_specs.py, ``sharded_state_dict_keys_map``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from megatron_llmjp.checkpoint.extra_states import is_extra_state
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.torch_dist import TensorEntry
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.plan import TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import (
    FINAL_NORM,
    LAYER,
    VOCABULARY,
    rectangular_parts,
    tensor_shapes,
)

FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms of local layers, and their names in Transformer Engine's fused layers."""

_NOT_WEIGHTS = re.compile(r"^(optimizer|rng_state|rerun_state_machine|opt_param_scheduler)")

_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which Transformer Engine stores an ``_extra_state`` object."""


def stored_key(name: str) -> tuple[str, int | None]:
    """Return the stored key of a canonical tensor, and its layer index in the stack."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name, None
    rest = match[2]
    for local, fused in FUSED_NORMS.items():
        rest = rest.replace(local, fused)
    return f"decoder.layers.{rest}", int(match[1])


def model_entries(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors of the model by key, without the prefix of wrapper modules."""
    kept = {
        key: entry
        for key, entry in entries.items()
        if not _NOT_WEIGHTS.search(key) and not is_extra_state(key)
    }
    for prefix in ("model.module.", "model.", "module."):
        if all(key.startswith(prefix) for key in kept):
            return {key.removeprefix(prefix): entry for key, entry in kept.items()}
    return kept


def tensor_reads(
    model: ModelConfig, rows: int, entries: dict[str, TensorEntry]
) -> dict[str, TensorRead]:
    """Return the read of every canonical tensor that is stored.

    Unexpected tensors keep their own names, so that they are reported.
    """
    found: dict[str, TensorRead] = {}
    used: set[str] = set()
    for name in tensor_shapes(model, rows):
        for key, layer in _candidates(name):
            if key in entries and (layer is None or entries[key].shape[0] > layer):
                found[name] = entries[key].tensor_read(layer)
                used.add(key)
                break
    for key in entries.keys() - used:
        found[key] = entries[key].tensor_read(None)
    return found


def _candidates(name: str) -> Iterable[tuple[str, int | None]]:
    """Yield possible keys: stacked with fused names, stacked with local names, numbered layers."""
    key, layer = stored_key(name)
    yield key, layer
    if layer is None:
        return
    prefix = LAYER.format(i=layer)
    rest = name.removeprefix(prefix)
    yield f"decoder.layers.{rest}", layer
    yield prefix + key.removeprefix("decoder.layers."), None
    yield name, None


def add_model_tensors(
    writer: TorchDistWriter, source: SourceCheckpoint, options: ConversionOptions, rows: int
) -> dict[str, TensorWrite]:
    """Add the tensors of a model to a distributed checkpoint.

    Args:
        writer: of the checkpoint.
        source: provides the model and the data types.
        options: provides ``--dtype``.
        rows: padded vocabulary size of the target.

    Returns:
        The write of every canonical tensor.
    """
    model = source.model
    writes = {}
    for name, shape in tensor_shapes(model, rows).items():
        key, index = stored_key(name)
        layer = None if index is None else (index, model.num_layers)
        placed = writer.add_tensor(key, shape, options.dtype_of(source.reads[name]), layer)
        layout = partial(rectangular_parts, places=tuple(box for box, _ in placed))
        slots = [[slot] for _, slot in placed]
        writes[name] = TensorWrite(layout, slots, rows if name in VOCABULARY else None)
    return writes


def add_extra_states(writer: TorchDistWriter, model: ModelConfig) -> None:
    """Add the empty extra states that Megatron-LM requires when it loads.

    With its own layers it requires those of the linear layers, with Transformer Engine's all.
    """
    for module in _EXTRA_STATES:
        for i in range(model.num_layers):
            key = f"decoder.layers.{module}._extra_state/shard_{i}_{model.num_layers}"
            writer.add_object(key, [None])
    writer.add_object(f"{FINAL_NORM}._extra_state/shard_0_1", [None])
