"""Merge of a LoRA adapter of PEFT into a model (``--adapter``), while tensors are copied.

``W + scaling * B A``, computed in fp32 and rounded once to the type of the weights. The names of an
adapter are those of transformers; the rules of the architecture give the canonical tensor and the
rows of each, so that the weights may be stored in any format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.computed_tensor import computed_read
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import StoredTensor
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import TensorRule
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import architecture_for
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import (
    OUTPUT_LAYER,
    VOCABULARY,
    WORD_EMBEDDINGS,
    Layout,
    Part,
    Shape,
    part_shapes,
)
from megatron_llmjp.convert.tuning.adapter_config import AdapterConfig, read_adapter_config
from megatron_llmjp.convert.tuning.adapter_keys import (
    AdapterTensors,
    module_key,
    read_adapter_tensors,
)
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PartChange:
    """The change of one stored part of a canonical tensor, in the layout of transformers."""

    rows: int | None
    """Rows that are changed; None for all. Padding rows of the vocabulary are not."""
    full: StoredTensor | None
    a: StoredTensor | None
    b: StoredTensor | None
    scaling: float
    is_transposed: bool
    """Whether the part is ``[in, out]``, as that of Conv1D and of embeddings."""

    def apply(self, part: Part) -> None:
        """Change the part in place."""
        view = part.view if self.rows is None else part.view[: self.rows]
        if self.full is not None:
            view.copy_(self.full.read().reshape(view.shape))
        if self.a is not None and self.b is not None:
            delta = (self.b.read().float() @ self.a.read().float()).mul_(self.scaling)
            view.add_((delta.t() if self.is_transposed else delta).reshape(view.shape))


def merge_adapter(source: SourceCheckpoint, folder: Path, dtype: DType | None) -> SourceCheckpoint:
    """Return a checkpoint whose weights include those of an adapter.

    Args:
        source: the base model.
        folder: the adapter's folder.
        dtype: the requested type of the output.

    Raises:
        UserError: the adapter is damaged, of an unsupported type, or belongs to another model.
    """
    if not folder.is_dir():
        raise UserError(f"--adapter {folder}: is not a folder")
    config = read_adapter_config(folder)
    tensors = read_adapter_tensors(folder)
    architecture = architecture_for(source.model)
    has_matrices = any(entry.a is not None for entry in tensors.values())
    if has_matrices and config.fan_in_fan_out != architecture.transposed_linears:
        raise UserError(
            f"{config.path}: fan_in_fan_out {config.fan_in_fan_out} does not fit "
            f"{architecture.class_name}; expected {architecture.transposed_linears}"
        )
    rules = architecture.expanded_rules(source.model)
    tensors = _with_stored_keys(tensors, rules)
    _check_names(tensors, rules, source, folder)
    reads = dict(source.reads)
    for rule in rules:
        read = source.reads[rule.name]
        changes = _changes(rule, read.shape, tensors, config, source.model)
        if changes:
            reads[rule.name] = _merged(read, rule, changes, dtype)
    return replace(
        source,
        reads=reads,
        optimizer=None,
        layout=f"{source.layout}, with a merged adapter",
        notes=[*source.notes, _note(folder, config, tensors)],
    )


def _with_stored_keys(
    tensors: Mapping[str, AdapterTensors], rules: Sequence[TensorRule]
) -> dict[str, AdapterTensors]:
    """Return the tensors by the stored keys of the base model."""
    stored = {module_key(key): key for rule in rules for key in rule.keys}
    return {stored.get(name, name): entry for name, entry in tensors.items()}


def _note(folder: Path, config: AdapterConfig, tensors: Mapping[str, AdapterTensors]) -> str:
    matrices = sum(entry.a is not None for entry in tensors.values())
    whole = sum(entry.full is not None for entry in tensors.values())
    base = f"; its base model is {config.base_model}" if config.base_model else ""
    stored = f", {whole} tensors replaced" if whole else ""
    return f"adapter {folder} was merged: {matrices} LoRA matrices{stored}{base}"


def _check_names(
    tensors: Mapping[str, AdapterTensors],
    rules: Sequence[TensorRule],
    source: SourceCheckpoint,
    folder: Path,
) -> None:
    """Check that the model has all tensors that the adapter changes.

    Raises:
        UserError: one is missing, or the embedding of a tied model would be changed, and with it
            the output layer.
    """
    known = {key: rule.name for rule in rules for key in rule.keys}
    tied = not source.model.untie_embeddings_and_output_weights
    for name in tensors:
        if name not in known:
            hint = "; its output layer is tied to the embedding" if tied else ""
            raise UserError(
                f"--adapter {folder}: changes {name}, which {source.path} does not have{hint}"
            )
        if tied and known[name] == WORD_EMBEDDINGS:
            raise UserError(
                f"--adapter {folder}: changes {name}, which is also the output layer of "
                f"{source.path}: they would have to be untied"
            )


def _changes(
    rule: TensorRule,
    shape: Shape,
    tensors: Mapping[str, AdapterTensors],
    config: AdapterConfig,
    model: ModelConfig,
) -> dict[int, PartChange]:
    """Return the changes of a canonical tensor by part.

    Raises:
        UserError: a tensor of the adapter has another shape.
    """
    found = {}
    shapes = part_shapes(rule.layout, shape)
    for index, (key, stored) in enumerate(zip(rule.keys, shapes, strict=True)):
        entry = tensors.get(key)
        if entry is None:
            continue
        module = key.removesuffix(".weight")
        is_conv1d = config.fan_in_fan_out and rule.name != OUTPUT_LAYER
        is_transposed = is_conv1d or entry.is_embedding
        rows = _changed_shape(entry, is_transposed, stored)[0]
        if rule.name in VOCABULARY and rows in (model.vocab_size or rows, stored[0]):
            stored = (min(rows, stored[0]), *stored[1:])
        _check_shapes(entry, is_transposed, stored, config.rank_of(module), f"{config.path}: {key}")
        found[index] = PartChange(
            stored[0] if rule.name in VOCABULARY else None,
            entry.full,
            entry.a,
            entry.b,
            config.scaling(module),
            is_transposed,
        )
    return found


def _changed_shape(entry: AdapterTensors, is_transposed: bool, default: Shape) -> Shape:
    """Return the shape of the tensor that an adapter's tensors change."""
    if entry.full is not None:
        return tuple(entry.full.shape)
    if entry.a is None or entry.b is None or len(entry.a.shape) != 2 or len(entry.b.shape) != 2:
        return default
    shape = (entry.b.shape[0], entry.a.shape[1])
    return shape[::-1] if is_transposed else shape


def _check_shapes(
    entry: AdapterTensors, is_transposed: bool, stored: Shape, rank: int, where: str
) -> None:
    if entry.full is not None and tuple(entry.full.shape) != stored:
        raise UserError(f"{where} has shape {tuple(entry.full.shape)}, the model's {stored}")
    if entry.a is None or entry.b is None:
        return
    outputs, inputs = stored[::-1] if is_transposed else stored
    shapes = tuple(entry.a.shape), tuple(entry.b.shape)
    if shapes != ((rank, inputs), (outputs, rank)):
        raise UserError(
            f"{where}: lora_A {shapes[0]} and lora_B {shapes[1]}, expected {(rank, inputs)} and "
            f"{(outputs, rank)} for rank {rank} and a weight of {stored}"
        )


def _merged(
    read: TensorRead, rule: TensorRule, changes: Mapping[int, PartChange], dtype: DType | None
) -> TensorRead:
    result = read.dtype if dtype in (None, read.dtype) else DType.float32
    compute = partial(_apply, read, rule.name, rule.layout, changes, result)
    return computed_read([read], result, DType.float32, compute)


def _apply(
    read: TensorRead,
    name: str,
    layout: Layout,
    changes: Mapping[int, PartChange],
    result: DType,
) -> torch.Tensor:
    tensor = read.read(name).to(result.torch)
    parts = layout(tensor)
    for index, change in changes.items():
        change.apply(parts[index])
    return tensor
