"""Weight files of a Hugging Face model: tensors by key, the index, and keys of older versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.safetensors import read_header
from megatron_llmjp.convert.files.storage import StoredTensor
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.convert.formats.base import check_tensor_names
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
)
from megatron_llmjp.convert.formats.hugging_face.config import read_json
from megatron_llmjp.convert.tensors import OUTPUT_LAYER, WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class WeightFiles:
    """File names of the weights in one file format.

    Attributes:
        single: the file of a model that is not divided.
        index: the index of a divided model.
        opened: returns the tensors of a file by key.
    """

    single: str
    index: str
    opened: Callable[[Path], Any]


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json", read_header)
TORCH_ARCHIVES = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", load_archive)


@dataclass(frozen=True)
class WeightIndex:
    """The index of a divided model: the file of each tensor, and the metadata."""

    file_of: dict[str, str]
    metadata: dict[str, Any]


def read_index(path: Path) -> WeightIndex:
    """Read an index.

    Raises:
        UserError: it is damaged, or names a file outside its folder.
    """
    content = read_json(path)
    file_of, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(file_of, dict) or not isinstance(metadata, dict):
        raise UserError(f"{path}: damaged: expected the objects weight_map and metadata")
    for name in file_of.values():
        if not isinstance(name, str) or "/" in name:
            raise UserError(f"{path}: damaged: {name!r} is not the name of a file in its folder")
    return WeightIndex(file_of, metadata)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder by key, from the files that transformers would load.

    Raises:
        UserError: the folder has no weights, or a file is missing or damaged.
    """
    for kind in (SAFETENSORS, TORCH_ARCHIVES):
        if (path / kind.single).is_file():
            return dict(kind.opened(path / kind.single))
        if (path / kind.index).is_file():
            file_of = read_index(path / kind.index).file_of
            shards: dict[str, dict[str, StoredTensor]] = {
                name: kind.opened(_existing(path / name)) for name in sorted(set(file_of.values()))
            }
            found = {key: t for shard in shards.values() for key, t in shard.items()}
            check_tensor_names(path / kind.index, file_of, found)
            return found
    raise UserError(
        f"{path}: no weights found; expected {SAFETENSORS.single}, {SAFETENSORS.index}, "
        f"{TORCH_ARCHIVES.single} or {TORCH_ARCHIVES.index}"
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name}, listed in the index, is missing")
    return path


def full_model_keys(
    architecture: HuggingFaceArchitecture, model: ModelConfig, stored: Mapping[str, T]
) -> tuple[dict[str, T], T | None]:
    """Return the parameters of a model by the keys of the full model, and the tied head.

    Args:
        architecture: the architecture.
        model: the model.
        stored: one value per stored key. Keys without parameters, such as masks of older versions,
            are dropped; keys of a model that was saved without its head get their prefix.

    Returns:
        The values by key, and the value of the copy of the embedding that some versions store as
        the head of a tied model; None without a copy.
    """
    found = {k: v for k, v in stored.items() if not architecture.ignored_keys.search(k)}
    prefix, head = architecture.base_prefix, _head_key(architecture, model)
    embedding = _key(architecture, model, WORD_EMBEDDINGS)
    if prefix and embedding.removeprefix(prefix) in found:
        found = {key if key == head else prefix + key: value for key, value in found.items()}
    if model.untie_embeddings_and_output_weights:
        return found, None
    copy = found.pop(head, None)
    return found, copy


def _head_key(architecture: HuggingFaceArchitecture, model: ModelConfig) -> str:
    untied = model.model_copy(update={"untie_embeddings_and_output_weights": True})
    return _key(architecture, untied, OUTPUT_LAYER)


def _key(architecture: HuggingFaceArchitecture, model: ModelConfig, name: str) -> str:
    """Return the stored key of a canonical tensor that is stored as a whole."""
    return next(rule.keys[0] for rule in architecture.rules(model) if rule.name == name)
