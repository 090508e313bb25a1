"""Tensors of a PEFT adapter by the tensor of the base model that they change.

The keys are ``base_model.model.MODULE.lora_A.weight`` and ``lora_B.weight`` of linear layers,
``lora_embedding_A`` and ``lora_embedding_B`` of embeddings, and ``base_model.model.MODULE.weight``
of modules that are stored whole (``modules_to_save``, ``bias``, resized embeddings). Source: peft,
utils/save_and_load.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.convert.files.safetensors import read_header
from megatron_llmjp.convert.files.storage import StoredTensor
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.errors import UserError

PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
_OLD_FILE = "adapter_model.bin"
_MATRIX = re.compile(r"(.+)\.lora_(embedding_)?(A|B)(\.weight)?")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
"""Modules that peft puts around those of the base model."""


_STORED_HEAD, _HEAD = "embed_out.", "lm_head."
"""GPT-NeoX's output layer in files, and as a module of transformers 5, which peft names."""


def module_key(key: str) -> str:
    """Return the key that peft uses for a stored key of the base model."""
    return f"{_HEAD}{key.removeprefix(_STORED_HEAD)}" if key.startswith(_STORED_HEAD) else key


@dataclass
class AdapterTensors:
    """The tensors of an adapter that change one tensor of the base model."""

    full: StoredTensor | None = None
    """Replaces the tensor."""
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    is_embedding: bool = False
    """Whether ``b a`` is ``[h, vocabulary]``."""


def read_adapter_tensors(folder: Path) -> dict[str, AdapterTensors]:
    """Return the tensors of an adapter by the key of the base model's tensor.

    Raises:
        UserError: the file is missing or damaged, or a key is unknown.
    """
    found: dict[str, AdapterTensors] = {}
    path, stored = _read_file(folder)
    for key, tensor in stored.items():
        if not key.startswith(PREFIX):
            raise UserError(f"{path}: {key}: expected keys that begin with {PREFIX}")
        name = key.removeprefix(PREFIX)
        matrix = _MATRIX.fullmatch(name)
        if matrix is None:
            if "lora_" in name:
                raise UserError(f"{path}: {key} is not supported; merge the adapter with peft")
            found.setdefault(_WRAPPERS.sub("", name), AdapterTensors()).full = tensor
            continue
        entry = found.setdefault(f"{_WRAPPERS.sub('', matrix[1] + '.')}weight", AdapterTensors())
        entry.is_embedding = matrix[2] is not None
        if matrix[3] == "A":
            entry.a = tensor
        else:
            entry.b = tensor
    for name, entry in found.items():
        if (entry.a is None) != (entry.b is None):
            raise UserError(f"{path}: {name} has only one of the matrices lora_A and lora_B")
    if not found:
        raise UserError(f"{path}: contains no tensors")
    return found


def _read_file(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    if (folder / FILE).is_file():
        return folder / FILE, dict(read_header(folder / FILE))
    if (folder / _OLD_FILE).is_file():
        return folder / _OLD_FILE, dict(load_archive(folder / _OLD_FILE))
    raise UserError(f"--adapter {folder}: neither {FILE} nor {_OLD_FILE} was found")
