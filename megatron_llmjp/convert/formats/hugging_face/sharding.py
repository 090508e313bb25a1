"""Distribution of tensors over safetensors files, and the index of the files.

Files, index and metadata are those of ``save_pretrained`` of transformers 5: saving a loaded model
sorts the keys, fills files up to a size in that order, and stores tensors by type and name. Source:
transformers, modeling_utils.py and core_model_loading.py; huggingface_hub, serialization/_base.py;
safetensors, tensor.rs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.safetensors import plan_safetensors
from megatron_llmjp.convert.files.storage import byte_count
from megatron_llmjp.convert.plan import OutputFile
from megatron_llmjp.convert.tensors import Shape

FILE_PATTERN = "model{suffix}.safetensors"

_TYPE_ORDER = (
    *(DType.float64, DType.int64, DType.float32, DType.int32, DType.bfloat16, DType.float16),
    *(DType.uint8, DType.bool),
)
"""Order of types in a file, from the last to the first of safetensors' ``Dtype``."""


class TensorKind(NamedTuple):
    """Shape and type of a stored tensor."""

    shape: Shape
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return byte_count(self.shape, self.dtype)


def split_by_size(
    tensors: Mapping[str, TensorKind], limit: int, sorted_as: Mapping[str, str]
) -> dict[str, str]:
    """Return the file of each tensor, with files of at most ``limit`` bytes.

    A larger tensor gets a file of its own.

    Args:
        tensors: all tensors by key.
        limit: bytes.
        sorted_as: keys to sort by that differ from the stored ones.
    """
    order = sorted(tensors, key=lambda key: _natural_key(sorted_as.get(key, key)))
    if sum(kind.nbytes for kind in tensors.values()) <= limit:
        return dict.fromkeys(order, FILE_PATTERN.format(suffix=""))
    from huggingface_hub import split_state_dict_into_shards_factory  # takes a second

    ordered = {key: tensors[key] for key in order}
    split = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda kind: kind.nbytes,
        filename_pattern=FILE_PATTERN,
        max_shard_size=limit,
    )
    return dict(split.tensor_to_filename)


def plan_files(tensors: Mapping[str, TensorKind], file_of: Mapping[str, str]) -> list[OutputFile]:
    """Lay out the files.

    Args:
        tensors: all tensors by key.
        file_of: file name of each tensor.
    """
    groups: dict[str, dict[str, tuple[Shape, DType]]] = {}
    for key in sorted(tensors, key=lambda key: (_TYPE_ORDER.index(tensors[key].dtype), key)):
        groups.setdefault(file_of[key], {})[key] = tensors[key]
    return [plan_safetensors(name, groups[name]) for name in sorted(groups)]


def index_content(
    tensors: Mapping[str, TensorKind], file_of: Mapping[str, str], with_parameters: bool
) -> str:
    """Return the content of ``model.safetensors.index.json``.

    Args:
        tensors: all tensors by key.
        file_of: file name of each tensor.
        with_parameters: store the number of parameters, as newer versions of transformers do.
    """
    metadata: dict[str, Any] = {"total_size": sum(kind.nbytes for kind in tensors.values())}
    if with_parameters:
        metadata["total_parameters"] = sum(math.prod(kind.shape) for kind in tensors.values())
    content = {"metadata": metadata, "weight_map": dict(file_of)}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _natural_key(key: str) -> list[tuple[int, int | str, int]]:
    """Return a sort key that orders layers by number, before names."""
    parts: list[tuple[int, int | str, int]] = []
    for part in key.split("."):
        text = part.rstrip("0123456789")
        number = int(part[len(text) :] or -1)
        parts.append((0, number, 0) if part.isdigit() else (1, text, number))
    return parts
