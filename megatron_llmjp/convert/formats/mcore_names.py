"""Tensor names in megatron-core's distributed checkpoints, native ones and Megatron-LM's.

Layers are stacked, ``[layers, ...]``, under one key without the layer index, and norms have the
names of Transformer Engine's fused layers, whichever layers were trained
(megatron/core/models/gpt/gpt_layer_specs.py, ``sharded_state_dict_keys_map``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from megatron_llmjp.checkpoint.extra_states import is_extra_state
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.torch_dist import TensorEntry
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.plan import TensorRead, TensorWrite
from megatron_llmjp.convert.strided_view import Shape
from megatron_llmjp.convert.tensors import (
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

_EXPERT = re.compile(r"(mlp\.experts\.)local_experts\.(\d+)\.(.*)")
_PRE_MLP = "pre_mlp_layernorm."

Lead = tuple[tuple[int, int], ...]
"""Index and number of parts for each dimension of a stack: the layer, the expert."""


class LayerNames(NamedTuple):
    """How the layers of a model with experts are named.

    megatron-core stacks layers if ``moe_layer_freq`` is 1, and numbers them if it is another number
    or a list (``TransformerBlock.sharded_state_dict``); this project always passes a list. Experts
    are stacked in both cases, ``[experts, ...]``, with and without grouped multiplication
    (``SequentialMLP`` and ``TEGroupedMLP``, ``sharded_state_dict``).
    """

    stacked: bool = True
    fuses_experts_norm: bool = False
    """Whether the norm before experts has the name of a fused one: Megatron-LM's local layers."""


def model_key(name: str, model: ModelConfig, names: LayerNames) -> tuple[str, Lead]:
    """Return the stored key of a canonical tensor, and its place in the stack of that key."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name, ()
    layer, rest = int(match[1]), match[2]
    fused = names.fuses_experts_norm or not model.expert_layers[layer]
    for local, other in FUSED_NORMS.items():
        if fused or local != _PRE_MLP:
            rest = rest.replace(local, other)
    lead: Lead = ((layer, model.num_layers),) if names.stacked else ()
    if expert := _EXPERT.fullmatch(rest):
        rest = f"{expert[1]}experts.{expert[3]}"
        lead = (*lead, (int(expert[2]), model.num_moe_experts or 1))
    return ("decoder.layers." if names.stacked else f"decoder.layers.{layer}.") + rest, lead


def stored_key(name: str) -> tuple[str, int | None]:
    """Return the stored key of a dense model's tensor, and its layer index in the stack."""
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
        for key, lead in _candidates(name, model):
            if key in entries and _has_part(entries[key], lead):
                found[name] = entries[key].tensor_read(lead)
                used.add(key)
                break
    for key in entries.keys() - used:
        found[key] = entries[key].tensor_read()
    return found


def _has_part(entry: TensorEntry, lead: Shape) -> bool:
    sizes = entry.shape[: len(lead)]
    return len(sizes) == len(lead) and all(i < n for i, n in zip(lead, sizes, strict=True))


def _candidates(name: str, model: ModelConfig) -> Iterable[tuple[str, Shape]]:
    """Yield possible keys: of stacked or numbered layers, with fused or local names of norms."""
    for stacked in (True, False):
        for fuses in (False, True):
            key, lead = model_key(name, model, LayerNames(stacked, fuses))
            yield key, tuple(index for index, _ in lead)
    for layer, rest in re.findall(r"decoder\.layers\.(\d+)\.(.*layernorm.*)", name):
        yield f"decoder.layers.{rest}", (int(layer),)
        yield name, ()


def add_model_tensors(
    writer: TorchDistWriter,
    source: SourceCheckpoint,
    options: ConversionOptions,
    rows: int,
    names: LayerNames = LayerNames(),  # noqa: B008 (immutable)
) -> dict[str, TensorWrite]:
    """Add the tensors of a model to a distributed checkpoint.

    Args:
        writer: of the checkpoint.
        source: provides the model and the data types.
        options: provides ``--dtype``.
        rows: padded vocabulary size of the target.
        names: how the layers are named.

    Returns:
        The write of every canonical tensor.
    """
    model = source.model
    writes = {}
    for name, shape in tensor_shapes(model, rows).items():
        key, lead = model_key(name, model, names)
        placed = writer.add_tensor(key, shape, options.dtype_of(source.reads[name]), lead)
        layout = partial(rectangular_parts, places=tuple(box for box, _ in placed))
        slots = [[slot] for _, slot in placed]
        writes[name] = TensorWrite(layout, slots, rows if name in VOCABULARY else None)
    return writes


def add_extra_states(writer: TorchDistWriter, model: ModelConfig, names: LayerNames) -> None:
    """Add the empty extra states that Megatron-LM requires when it loads.

    With its own layers it requires those of the linear layers, with Transformer Engine's all.
    """
    modules = dict.fromkeys(
        (*model_key(name, model, names)[1:], key)
        for name in tensor_shapes(model, 1)
        for key in _extra_state_modules(name, model, names)
    )
    for lead, module in modules:
        index = ".".join(str(i) for i, _ in lead) or "0"
        number = ".".join(str(n) for _, n in lead) or "1"
        writer.add_object(f"{module}._extra_state/shard_{index}_{number}", [None])


def _extra_state_modules(name: str, model: ModelConfig, names: LayerNames) -> Iterable[str]:
    """Yield the keys of modules with an extra state, for the weight of a module."""
    key, _ = model_key(name, model, names)
    module, _, kind = key.rpartition(".")
    if kind == "weight" and (".linear_" in module or "layernorm" in module):
        yield module
    if module.endswith("self_attention.linear_proj") and kind == "weight":
        yield module.replace("linear_proj", "core_attention")
