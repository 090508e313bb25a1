"""Reader and writer of Hugging Face models: config.json, safetensors shards and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.save_folder import HUGGING_FACE
from megatron_llmjp.convert.files.storage import dtype_name
from megatron_llmjp.convert.formats.base import (
    ConversionOptions,
    SourceCheckpoint,
    check_tensor_names,
)
from megatron_llmjp.convert.formats.hugging_face import generation
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
    TensorRule,
)
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import (
    architecture_for,
    find_architecture,
)
from megatron_llmjp.convert.formats.hugging_face.config import (
    json_bytes,
    read_json,
    rope_warnings,
)
from megatron_llmjp.convert.formats.hugging_face.reference_model import (
    CONFIG,
    TORCH_NAMES,
    ReferenceModel,
    compare_model,
    open_reference,
)
from megatron_llmjp.convert.formats.hugging_face.sharding import (
    TensorKind,
    index_content,
    plan_files,
    split_by_size,
)
from megatron_llmjp.convert.formats.hugging_face.tokenizer import export_tokenizer
from megatron_llmjp.convert.formats.hugging_face.weights import (
    SAFETENSORS,
    full_model_keys,
    read_tensors,
)
from megatron_llmjp.convert.model_tokenizer import open_tokenizer
from megatron_llmjp.convert.plan import Checksums, OutputPlan, TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import (
    VOCABULARY,
    WORD_EMBEDDINGS,
    part_shapes,
    tensor_shapes,
)
from megatron_llmjp.convert.tuning.chat_template import exported_template, install_chat_template
from megatron_llmjp.errors import UserError


def read_hugging_face(path: Path) -> SourceCheckpoint:
    """Open a Hugging Face model.

    Raises:
        UserError: a file is missing or damaged, or the model is not supported.
    """
    config = read_json(path / CONFIG)
    architecture = find_architecture(config, path / CONFIG)
    model = architecture.from_config(config, str(path / CONFIG))
    tensors, tied_head = full_model_keys(architecture, model, read_tensors(path))
    replicas = {} if tied_head is None else {WORD_EMBEDDINGS: (tied_head,)}
    rules = architecture.expanded_rules(model)
    check_tensor_names(path, [key for rule in rules for key in rule.keys], tensors)
    shape_of = tensor_shapes(model, model.vocab_size or 0)
    reads = {}
    for rule in rules:
        parts = [tensors[key] for key in rule.keys]
        reads[rule.name] = TensorRead(
            shape_of[rule.name], parts[0].dtype, parts, rule.layout, replicas.get(rule.name, ())
        )
    files = len({stored.source for stored in tensors.values()})
    return SourceCheckpoint(
        HUGGING_FACE,
        path,
        model,
        reads,
        f"{files} file(s)",
        tokenizer=path,
        seq_length=model.max_position_embeddings,
        generation=generation.read_generation(config, path / CONFIG, path / generation.FILE),
    )


@dataclass
class _PlainFiles:
    """Configuration, tokenizer and generation settings, with messages for the user."""

    files: dict[str, bytes]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    chat_template: str | None = None
    """Installed in the written folder."""


def plan_hugging_face(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out a Hugging Face model, in the form of ``--like`` if it is given.

    Raises:
        UserError: no Hugging Face architecture supports the model, or it differs from ``--like``.
    """
    reference = None if options.like is None else open_reference(options.like)
    warnings = rope_warnings(source.model)
    if reference is not None:
        warnings += compare_model(reference, source)
    architecture = architecture_for(source.model) if reference is None else reference.architecture
    rows = _vocabulary_rows(source, options, reference)
    form = options if reference is None else reference.export_options(options)
    rules = architecture.expanded_rules(source.model)
    tensors = _tensor_kinds(rules, source, form, rows)
    file_of = _stored_division(tensors, options, reference)
    if file_of is None:
        file_of = split_by_size(tensors, options.max_shard_size, architecture.sorted_as)
    files = plan_files(tensors, file_of)
    slots = {key: slot for file in files for key, slot in file.slots.items()}
    writes = {
        rule.name: TensorWrite(
            rule.layout,
            [[slots[key]] for key in rule.keys],
            rows if rule.name in VOCABULARY else None,
        )
        for rule in rules
    }
    plain = _plain_files(architecture, source, options, reference, rows)
    if set(file_of.values()) != {SAFETENSORS.single}:
        counted = reference is None or reference.counts_parameters()
        plain.files[SAFETENSORS.index] = index_content(tensors, file_of, counted).encode()

    def finish(folder: Path, _: Checksums) -> None:
        for name, data in plain.files.items():
            (folder / name).write_bytes(data)
        if plain.chat_template is not None:
            install_chat_template(folder, plain.chat_template)

    return OutputPlan(files, writes, finish, plain.notes, [*warnings, *plain.warnings])


def _vocabulary_rows(
    source: SourceCheckpoint, options: ConversionOptions, reference: ReferenceModel | None
) -> int:
    """Return the rows of the embedding to write.

    Raises:
        UserError: ``--keep-vocab-padding`` contradicts ``--like``.
    """
    stored = source.padded_vocab_size
    if reference is not None:
        if options.keep_vocabulary_padding and reference.rows != stored:
            raise UserError(
                f"--keep-vocab-padding: the model has {stored} rows, --like {reference.path} has "
                f"{reference.rows}; omit one of the flags"
            )
        return reference.rows
    if source.model.vocab_size is None or options.keep_vocabulary_padding:
        return stored
    return source.model.vocab_size


def _tensor_kinds(
    rules: list[TensorRule], source: SourceCheckpoint, options: ConversionOptions, rows: int
) -> dict[str, TensorKind]:
    """Return shape and type of each tensor to write, by key."""
    found: dict[str, TensorKind] = {}
    shapes = tensor_shapes(source.model, rows)
    for rule in rules:
        dtype = options.dtype_of(source.reads[rule.name])
        parts = part_shapes(rule.layout, shapes[rule.name])
        found |= {k: TensorKind(shape, dtype) for k, shape in zip(rule.keys, parts, strict=True)}
    return found


def _stored_division(
    tensors: Mapping[str, TensorKind], options: ConversionOptions, reference: ReferenceModel | None
) -> dict[str, str] | None:
    """Return the file of each tensor in ``--like``; None if it has no weights.

    Raises:
        UserError: the index of ``--like`` has other tensors than the model.
    """
    if reference is None or options.shard_size_given:
        return None
    found = reference.file_of_tensors(tensors)
    if found is not None:
        check_tensor_names(reference.path.parent, tensors, found)
    return found


def _plain_files(
    architecture: HuggingFaceArchitecture,
    source: SourceCheckpoint,
    options: ConversionOptions,
    reference: ReferenceModel | None,
    rows: int,
) -> _PlainFiles:
    """Return config.json, generation_config.json and the tokenizer's files.

    With the tokenizer of ``--like``, all are copied from there.
    """
    form = options if reference is None else reference.export_options(options)
    tokenizer = open_tokenizer(source, form, rows)
    is_copied = reference is not None and options.tokenizer is None and bool(reference.tokenizer)
    keep = is_copied or (not tokenizer.overrides_eod and source.generation is not None)
    exported = export_tokenizer(tokenizer, keep, rows)
    text, changes = generation.resolve_generation(
        source.generation if reference is None else reference.generation,
        tokenizer.token_ids(rows),
        tokenizer.overrides_eod and not is_copied,
        rows,
    )
    found = _PlainFiles(dict(exported.files), [*tokenizer.notes, *exported.notes])
    found.chat_template = exported_template(options, tokenizer.files, exported.files)
    found.warnings = [*tokenizer.warnings, *exported.warnings, *changes]
    if reference is None:
        config = _config(architecture, source, options, rows, text.token_ids)
        found.files[CONFIG] = json_bytes(config)
        found.files[generation.FILE] = json_bytes(text.config or {})
        return found
    found.files |= reference.settings_files(None if is_copied else text, options.dtype)
    if is_copied:
        found.warnings += reference.check_end_of_text(tokenizer)
    return found


def _config(
    architecture: HuggingFaceArchitecture,
    source: SourceCheckpoint,
    options: ConversionOptions,
    rows: int,
    ids: Mapping[str, Any],
) -> dict[str, Any]:
    """Return config.json with the keys of transformers 4.35 and those of 5."""
    dtype = TORCH_NAMES[dtype_name(options.dtype or source.dtype)]
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.to_config(source.model),
        "vocab_size": rows,
        "tie_word_embeddings": not source.model.untie_embeddings_and_output_weights,
        # Unknown ids are null: the defaults of the classes would be other tokens.
        **{"bos_token_id": None, "eos_token_id": None, **ids},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
