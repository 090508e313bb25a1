"""Tensor names of Megatron-DeepSpeed: keys of layer files, parameters of the optimizer.

Source: megatron/model/gpt_model.py and transformer.py of LLM-jp's fork. The numbers
of layer files differ between versions; the keys identify the modules.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.storage import StoredTensor
from megatron_llmjp.convert.formats.rank_files import RankTensors, canonical_name_in_layer
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import FINAL_NORM, LAYER, OUTPUT_LAYER, Part, tensor_shapes
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    from megatron_llmjp.convert.tensors import TensorView

_MODULES = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.final_layernorm": FINAL_NORM,
    "language_model.encoder.": "",
    "language_model.output_layer": "output_layer",
}


def canonical_name(key: str, stored: StoredTensor, layer: int) -> tuple[str, str]:
    """Return the canonical name of a key in a layer file, and the prefix of its layer, if any.

    Raises:
        UserError: the position embeddings are split by sequence parallelism.
    """
    if key in ("word_embeddings.weight", "position_embeddings.weight"):
        return f"embedding.{key}", ""
    if key == "lm_head.weight":
        return OUTPUT_LAYER, ""
    if key in ("weight", "bias"):
        return f"{FINAL_NORM}.{key}", ""
    if key.endswith("local_embeddings.weight"):
        raise UserError(f"{stored.source}: position embeddings split by sequence parallelism")
    prefix = LAYER.format(i=layer)
    return prefix + canonical_name_in_layer(key), prefix


def canonical_parameter_name(name: str, stored: StoredTensor, numbers: list[int]) -> str:
    """Return the canonical name of a DeepSpeed parameter name.

    Args:
        name: such as ``4.mlp.dense_4h_to_h.weight``; 4 is the number of its layer file.
        stored: the tensor, for messages.
        numbers: numbers of the layer files; the first is that of the embedding.
    """
    for root in ("tied_modules.embed.", f"{numbers[0] if numbers else 1}."):
        if name.startswith(root):
            return canonical_name(name.removeprefix(root), stored, 0)[0]
    if match := re.match(r"(\d+)\.(.*)", name):
        number = int(match[1])
        layer = numbers.index(number) - 1 if number in numbers else 0
        return canonical_name(match[2], stored, layer)[0]
    name = name.removeprefix("module.")
    for old, new in _MODULES.items():
        name = name.replace(old, new)
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    return LAYER.format(i=match[1]) + canonical_name_in_layer(match[2]) if match else name


def join_separate_keys(
    folder: Path, gathered: RankTensors, model: ModelConfig, tensor: int
) -> dict[str, TensorRead]:
    """Remove and join ``query`` and ``key_value`` of grouped-query attention.

    They were stored separately before November 2023.

    Raises:
        UserError: the tensors do not match the model.
    """
    reads = {}
    shape_of = tensor_shapes(model, 1)
    for i in range(model.num_layers):
        for kind in ("weight", "bias"):
            prefix = f"{LAYER.format(i=i)}self_attention."
            query = gathered.parts.pop(f"{prefix}query.{kind}", None)
            pair = gathered.parts.pop(f"{prefix}key_value.{kind}", None)
            if query is None or pair is None:
                continue
            name = f"{prefix}linear_qkv.{kind}"
            if name not in shape_of or len(query) != tensor or len(pair) != tensor:
                raise UserError(
                    f"{folder}: query and key_value of layer {i} do not match the model"
                )
            layout = partial(
                query_and_key_value, groups=model.query_groups, head_dim=model.head_dim, size=tensor
            )
            parts = [ranks[t] for t in range(tensor) for ranks in (query, pair)]
            reads[name] = TensorRead(shape_of[name], query[0].dtype, parts, layout)
    return reads


def query_and_key_value(tensor: TensorView, groups: int, head_dim: int, size: int) -> list[Part]:
    """Split rows of grouped ``linear_qkv`` into ``query`` and ``key_value`` of each rank."""
    rest = tuple(tensor.shape[1:])
    grouped = tensor.view(size, groups // size, -1, head_dim, *rest)
    parts = []
    for rank in range(size):
        for view in (grouped[rank, :, :-2], grouped[rank, :, -2:]):
            count = view.shape[0] * view.shape[1] * head_dim
            parts.append(Part(view, (count, *rest)))
    return parts
