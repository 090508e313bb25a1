"""An existing Hugging Face model whose form an export takes (``--like``).

Architecture, vocabulary and tokenizer of a converted model are compared with it. An export has its
config.json, type of weights, files, tokenizer and generation settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import DTYPES, dtype_name
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face import generation
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
)
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import find_architecture
from megatron_llmjp.convert.formats.hugging_face.config import json_bytes, read_json
from megatron_llmjp.convert.formats.hugging_face.generation import EOS, GenerationSettings
from megatron_llmjp.convert.formats.hugging_face.weights import (
    SAFETENSORS,
    TORCH_ARCHIVES,
    full_model_keys,
    read_index,
)
from megatron_llmjp.convert.model_tokenizer import ModelTokenizer, open_tokenizer
from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields

CONFIG = "config.json"
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of types in config.json, by their names in ``--dtype``."""

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys of the weights' type, of transformers 5 and 4."""
_TRAINING_KEYS = frozenset(
    {
        *("initializer_range", "attention_dropout", "hidden_dropout"),
        *("embd_pdrop", "resid_pdrop", "attn_pdrop", "pretraining_tp"),
    }
)
"""Keys of config.json without effect on the outputs of a trained model."""
_LENGTH = "max_position_embeddings"
_OWN_NAME = "_name_or_path"
"""Key that names the reference itself; not copied."""
_CODE = "auto_map"
"""Key that names files with model code."""


@dataclass(frozen=True)
class ReferenceModel:
    """The model of ``--like``.

    Attributes:
        path: its config.json.
        folder: its folder; None if only config.json was given.
        config: content of config.json.
        architecture: its architecture.
        model: the same as a model configuration; ``vocab_size`` is the number of rows.
        generation: its special token ids and generation settings.
    """

    path: Path
    folder: Path | None
    config: Mapping[str, Any]
    architecture: HuggingFaceArchitecture
    model: ModelConfig
    generation: GenerationSettings

    @property
    def rows(self) -> int:
        """Size of the vocabulary, padding included."""
        return self.model.vocab_size or 0

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer; None if there is none."""
        folder = self.folder
        return folder if folder is not None and stored_tokenizer_fields(folder) else None

    def dtype(self) -> DType | None:
        """Return the type of the weights; None if config.json has none.

        Raises:
            UserError: the type is not supported.
        """
        name = next((self.config[key] for key in _DTYPE_KEYS if self.config.get(key)), None)
        types = {torch_name: DTYPES[short] for short, torch_name in TORCH_NAMES.items()}
        if name is not None and name not in types:
            raise UserError(
                f"--like {self.path}: weights of type {name!r}, expected one of "
                f"{', '.join(types)}; give --dtype"
            )
        return None if name is None else types[name]

    def export_options(self, options: ConversionOptions) -> ConversionOptions:
        """Return the options of an export in this form; flags of the user take precedence."""
        return replace(
            options,
            dtype=options.dtype or self.dtype(),
            tokenizer=options.tokenizer or self.tokenizer,
        )

    def file_of_tensors(self, keys: Iterable[str]) -> dict[str, str] | None:
        """Return the safetensors file of each tensor; None if the folder has no weights.

        Args:
            keys: keys of the model, for a reference with a single file.

        Raises:
            UserError: the index is damaged.
        """
        if self.folder is None:
            return None
        for kind in (SAFETENSORS, TORCH_ARCHIVES):
            if (self.folder / kind.single).is_file():
                return dict.fromkeys(keys, SAFETENSORS.single)
            if (self.folder / kind.index).is_file():
                stored = read_index(self.folder / kind.index).file_of
                file_of, _ = full_model_keys(self.architecture, self.model, stored)
                return {key: _safetensors_name(name) for key, name in file_of.items()}
        return None

    def counts_parameters(self) -> bool:
        """Return whether the index has the number of parameters, or there is no index."""
        index = None if self.folder is None else self.folder / SAFETENSORS.index
        if index is None or not index.is_file():
            return True
        return "total_parameters" in read_index(index).metadata

    def settings_files(
        self, changed: GenerationSettings | None, dtype: DType | None
    ) -> dict[str, bytes]:
        """Return config.json and generation_config.json of an export, by name.

        They are copied unless a value changes. A folder without generation_config.json gives an
        export without it.

        Args:
            changed: settings for another tokenizer; None with the tokenizer of the reference.
            dtype: type of the weights from ``--dtype``, if given.
        """
        config = {key: value for key, value in self.config.items() if key != _OWN_NAME}
        config |= changed.token_ids if changed is not None else {}
        if dtype is not None:
            keys = [key for key in _DTYPE_KEYS if key in config] or list(_DTYPE_KEYS)
            config |= dict.fromkeys(keys, TORCH_NAMES[dtype_name(dtype)])
        is_same = config == self.config
        files = {CONFIG: self.path.read_bytes() if is_same else json_bytes(config)}
        stored = None if self.folder is None else self.folder / generation.FILE
        if stored is None or (changed is not None and stored.is_file()):
            settings = self.generation if changed is None else changed
            files[generation.FILE] = json_bytes(settings.config or {})
        elif stored.is_file():
            files[generation.FILE] = stored.read_bytes()
        return files

    def check_end_of_text(self, tokenizer: ModelTokenizer) -> list[str]:
        """Return a warning if the run's end-of-document id does not end text in the reference."""
        settings = self.generation.config or self.generation.token_ids
        ends = generation.as_list(settings.get(EOS))
        if tokenizer.kind is None or tokenizer.eod_id is None or tokenizer.eod_id in ends:
            return []
        return [
            f"--like {self.path.parent}: its {EOS} {ends} does not contain {tokenizer.eod_id}, "
            "which ended the documents of the run: the model may not stop"
        ]


def open_reference(path: Path) -> ReferenceModel:
    """Open the model of ``--like``.

    Args:
        path: folder of a model, or a config.json.

    Raises:
        UserError: it does not exist, is damaged, or is a model that cannot be exported.
    """
    if not path.exists():
        raise UserError(
            f"--like {path}: does not exist; expected the folder of a Hugging Face model, or its "
            f"{CONFIG}{download_hint(path)}"
        )
    folder = path if path.is_dir() else None
    file = path / CONFIG if folder else path
    config = read_json(file)
    architecture = find_architecture(config, file)
    classes = config.get("architectures") or [architecture.class_name]
    if classes != [architecture.class_name]:
        raise UserError(
            f"--like {file}: architectures is {classes}, expected [{architecture.class_name!r}]"
        )
    if _CODE in config:
        raise UserError(
            f"--like {file}: {_CODE} names model code, which an export does not contain; give a "
            f"model of transformers, or remove {_CODE}"
        )
    try:
        model = architecture.from_config(config, str(file))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"--like {file}: damaged ({error!r:.300})") from error
    stored = None if folder is None else folder / generation.FILE
    settings = generation.read_generation(config, file, stored)
    return ReferenceModel(file, folder, config, architecture, model, settings)


def compare_model(reference: ReferenceModel, source: SourceCheckpoint) -> list[str]:
    """Compare the architecture and the vocabulary of a checkpoint; return warnings.

    Raises:
        UserError: they differ; the message lists the fields.
    """
    unsupported = reference.architecture.refusals(source.model)
    if unsupported:
        name = reference.architecture.class_name
        raise UserError(f"--like {reference.path}: {name} {'; '.join(unsupported)}")
    ours, theirs = (_fields(reference.architecture, m) for m in (source.model, reference.model))
    wrong = [
        f"  {key}: {ours.get(key)!r}, in the reference {theirs.get(key)!r}"
        for key in {**theirs, **ours}
        if ours.get(key) != theirs.get(key)
    ]
    wrong += _vocabulary_problem(reference, source)
    if wrong:
        raise UserError("\n".join([f"--like {reference.path}: {source.path} differs", *wrong]))
    found, expected = (m.max_position_embeddings for m in (source.model, reference.model))
    if found == expected:
        return []
    return [f"--like {reference.path}: {_LENGTH} is {expected}, the model's own is {found}"]


def _fields(architecture: HuggingFaceArchitecture, model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that determine the outputs of a model."""
    keys = architecture.to_config(model)
    keys["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
    ignored = _TRAINING_KEYS | ({_LENGTH} if model.is_rotary else set())
    return {key: value for key, value in keys.items() if key not in ignored}


def _vocabulary_problem(reference: ReferenceModel, source: SourceCheckpoint) -> list[str]:
    rows, stored, size = reference.rows, source.padded_vocab_size, source.model.vocab_size
    if size is None and rows < stored:
        return [
            f"  vocab_size: unknown, in {stored} rows, in the reference {rows}; give --vocab-size"
        ]
    if size is not None and rows < size:
        return [f"  vocab_size: {size}, in the reference {rows}"]
    return []


def check_import(source: SourceCheckpoint, options: ConversionOptions) -> list[str]:
    """Compare a checkpoint that is not exported with ``--like``; return warnings.

    Compares the architecture, the vocabulary, the type of the weights, the ids of the tokenizer and
    the end-of-text ids.

    Raises:
        UserError: architecture, vocabulary or ids of the tokenizer differ.
    """
    assert options.like is not None
    reference = open_reference(options.like)
    warnings = compare_model(reference, source)
    ours, theirs = options.dtype or source.dtype, reference.dtype()
    if theirs is not None and ours != theirs:
        warnings.append(
            f"--like {reference.path}: its weights are {dtype_name(theirs)}, those of the output "
            f"{dtype_name(ours)}"
        )
    if reference.tokenizer is not None:
        own = replace(source, tokenizer=options.tokenizer or source.tokenizer)
        form = replace(options, tokenizer=reference.tokenizer)
        compared = open_tokenizer(own, form, reference.rows)
        warnings += [*compared.warnings, *reference.check_end_of_text(compared)]
    return warnings


def _safetensors_name(name: str) -> str:
    """Return the name of the safetensors file that replaces a file of the reference."""
    if name.endswith(".safetensors"):
        return name
    return f"{name.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"
