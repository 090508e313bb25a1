"""Tensors in checkpoints with one file per rank: names, tensor-parallel parts, padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.storage import StoredTensor, dtype_name
from megatron_llmjp.convert.plan import Slot, TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import (
    VOCABULARY,
    WORD_EMBEDDINGS,
    Layout,
    parallel_split,
    part_shapes,
    rank_layout,
    tensor_shapes,
)
from megatron_llmjp.errors import UserError

OLD_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
"""Modules of a layer before megatron-core and in Megatron-DeepSpeed, with megatron-core's names."""


def canonical_name_in_layer(old: str) -> str:
    """Return the canonical name, relative to its layer, of a parameter with an old or new name."""
    module, _, kind = old.rpartition(".")
    return f"{OLD_NAMES.get(module, module)}.{kind}"


@dataclass
class RankTensors:
    """Stored tensors by canonical name and tensor-parallel rank."""

    parts: dict[str, dict[int, StoredTensor]] = field(default_factory=dict)

    def add(self, name: str, rank: int, stored: StoredTensor) -> None:
        """Add the tensor of one rank.

        Raises:
            UserError: the rank has this tensor already.
        """
        ranks = self.parts.setdefault(name, {})
        if rank in ranks:
            raise UserError(f"{stored.source}: duplicate tensor {name}")
        ranks[rank] = stored

    def reads(self, path: Path, model: ModelConfig, size: int) -> dict[str, TensorRead]:
        """Return the read of every tensor from ``size`` tensor-parallel ranks.

        Raises:
            UserError: a tensor of a rank is missing, or a size is not divisible.
        """
        if WORD_EMBEDDINGS not in self.parts:
            raise UserError(f"{path}: word embeddings are missing")
        first = self.parts[WORD_EMBEDDINGS]
        rows = sum(stored.shape[0] for stored in first.values())
        shape_of = tensor_shapes(model, rows)
        found = {}
        for name, ranks in self.parts.items():
            if sorted(ranks) != list(range(size)):
                raise UserError(
                    f"{path}: {name} was found for tensor-parallel ranks {sorted(ranks)}, "
                    f"expected 0 to {size - 1}"
                )
            found[name] = self._read(name, [ranks[r] for r in range(size)], model, shape_of)
        return found

    def _read(
        self,
        name: str,
        ranks: list[StoredTensor],
        model: ModelConfig,
        shape_of: dict[str, tuple[int, ...]],
    ) -> TensorRead:
        if name not in shape_of:  # reported as unexpected later
            return TensorRead(tuple(ranks[0].shape), ranks[0].dtype, ranks[:1])
        kinds = {dtype_name(stored.dtype) for stored in ranks}
        if len(kinds) > 1:
            raise UserError(f"{ranks[0].source}: {name} has types {', '.join(sorted(kinds))}")
        shape, dtype = shape_of[name], ranks[0].dtype
        if parallel_split(name, model) == "replicated":
            return TensorRead(shape, dtype, ranks[:1], replicas=tuple(ranks[1:]))
        return TensorRead(shape, dtype, ranks, tensor_parallel_layout(name, model, len(ranks)))


def tensor_parallel_layout(name: str, model: ModelConfig, size: int) -> Layout:
    """Return the layout over ranks, after checking that the sizes are divisible."""
    check_parallel_sizes(model, size)
    return rank_layout(name, model, size)


def check_parallel_sizes(model: ModelConfig, tensor: int, pipeline: int = 1) -> None:
    """Check that the model's sizes are divisible by the parallel sizes.

    Raises:
        UserError: one is not.
    """
    for what, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.query_groups),
        ("ffn_hidden_size", 0 if all(model.expert_layers) else model.ffn_size),
        ("moe_ffn_hidden_size", model.expert_ffn_size if model.has_experts else 0),
        ("moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size or 0),
    ):
        if count % tensor:
            raise UserError(f"{what} {count} is not divisible by tensor parallel size {tensor}")
    if model.num_layers % pipeline:
        raise UserError(
            f"num_layers {model.num_layers} is not divisible by pipeline parallel size {pipeline}"
        )


def rank_shape(name: str, model: ModelConfig, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return the shape of one tensor-parallel rank's part of a canonical tensor."""
    return part_shapes(tensor_parallel_layout(name, model, size), shape)[0]


def rank_write(
    name: str, model: ModelConfig, size: int, slots: Mapping[int, list[Slot]], rows: int
) -> TensorWrite:
    """Return the write of a canonical tensor to the slots of each tensor-parallel rank."""
    layout = tensor_parallel_layout(name, model, size)
    if parallel_split(name, model) == "replicated" or size == 1:
        places = [[slot for rank in range(size) for slot in slots[rank]]]
    else:
        places = [slots[rank] for rank in range(size)]
    return TensorWrite(layout, places, rows if name in VOCABULARY else None)


def target_padded_vocab_size(
    model: ModelConfig, stored: int, tensor: int, divisible_by: int | None = None
) -> int:
    """Return the vocabulary size padded for a tensor parallel size, as in Megatron-LM."""
    update = {"padded_vocab_size": None, "vocab_size": model.vocab_size or stored}
    if model.vocab_size is None and stored % tensor == 0:
        return stored  # unpadded size unknown: keep every row
    if divisible_by is not None:
        update["make_vocab_size_divisible_by"] = divisible_by
    return model.model_copy(update=update).compute_padded_vocab_size(tensor)
