"""Reader and writer of Hugging Face models: config.json, safetensors shards and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.checkpoint.save_folder import HUGGING_FACE
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.safetensors import plan_safetensors, read_header
from megatron_llmjp.convert.files.storage import StoredTensor, byte_count, dtype_name
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.convert.formats.base import (
    ConversionOptions,
    SourceCheckpoint,
    check_tensor_names,
)
from megatron_llmjp.convert.formats.hugging_face import generation
from megatron_llmjp.convert.formats.hugging_face.architecture import HuggingFaceArchitecture
from megatron_llmjp.convert.formats.hugging_face.config import read_json, write_json
from megatron_llmjp.convert.formats.hugging_face.registry import ARCHITECTURES, architecture_for
from megatron_llmjp.convert.formats.hugging_face.tokenizer import export_tokenizer
from megatron_llmjp.convert.model_tokenizer import open_tokenizer
from megatron_llmjp.convert.plan import Checksums, OutputFile, OutputPlan, TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import (
    OUTPUT_LAYER,
    VOCABULARY,
    WORD_EMBEDDINGS,
    Shape,
    part_shapes,
    tensor_shapes,
)
from megatron_llmjp.errors import UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def read_hugging_face(path: Path) -> SourceCheckpoint:
    """Open a Hugging Face model.

    Raises:
        UserError: a file is missing or damaged, or the model is not supported.
    """
    config = read_json(path / CONFIG)
    architecture = ARCHITECTURES.get(config.get("model_type", ""))
    if architecture is None:
        raise UserError(
            f"{path / CONFIG}: model_type {config.get('model_type')!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse_quantized(config, path / CONFIG)
    model = architecture.from_config(config, str(path / CONFIG))
    stored = _tensors(path).items()
    tensors = {k: v for k, v in stored if not architecture.ignored_keys.search(k)}
    tensors = _with_base_prefix(architecture, model, tensors)
    rules = architecture.expanded_rules(model)
    replicas = _pop_tied_head(architecture, model, tensors)
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
        generation=generation.read_generation(path, config),
    )


def _refuse_quantized(config: dict[str, Any], where: Path) -> None:
    """Refuse quantized weights: integer codes and scales, specific to the quantization method.

    Raises:
        UserError: config.json has a ``quantization_config``.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    raise UserError(
        f"{where}: quantization_config (quant_method {method!r}): quantized weights cannot be "
        "converted: use the original model, or dequantize this one with transformers "
        "(model.dequantize()) and save it"
    )


def _with_base_prefix(
    architecture: HuggingFaceArchitecture, model: ModelConfig, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors under the keys of the full model if the base model was saved."""
    prefix = architecture.base_prefix
    embedding, head = _key(architecture, model, WORD_EMBEDDINGS), _head_key(architecture, model)
    if not prefix or embedding.removeprefix(prefix) not in tensors:
        return tensors
    return {key if key == head else prefix + key: stored for key, stored in tensors.items()}


def _pop_tied_head(
    architecture: HuggingFaceArchitecture, model: ModelConfig, tensors: dict[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, ...]]:
    """Remove the head of a tied model; return it as a replica of the embedding."""
    if model.untie_embeddings_and_output_weights:
        return {}
    copy = tensors.pop(_head_key(architecture, model), None)
    return {} if copy is None else {WORD_EMBEDDINGS: (copy,)}


def _head_key(architecture: HuggingFaceArchitecture, model: ModelConfig) -> str:
    untied = model.model_copy(update={"untie_embeddings_and_output_weights": True})
    return _key(architecture, untied, OUTPUT_LAYER)


def _key(architecture: HuggingFaceArchitecture, model: ModelConfig, name: str) -> str:
    """Return the stored key of a canonical tensor that is stored as a whole."""
    return next(rule.keys[0] for rule in architecture.rules(model) if rule.name == name)


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder by key, from the files that transformers would load."""
    kinds: list[tuple[str, str, Callable[[Path], Any]]] = [
        ("model.safetensors", INDEX, read_header),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", load_archive),
    ]
    for single, index, opened in kinds:
        if (path / single).is_file():
            return dict(opened(path / single))
        if (path / index).is_file():
            weight_map = read_json(path / index)["weight_map"]
            shards: dict[str, dict[str, StoredTensor]] = {
                name: opened(_inside(path, name)) for name in sorted(set(weight_map.values()))
            }
            found = {key: t for shard in shards.values() for key, t in shard.items()}
            check_tensor_names(path / index, weight_map, found)
            return found
    raise UserError(
        f"{path}: no weights found; expected model.safetensors, {INDEX}, "
        "pytorch_model.bin or pytorch_model.bin.index.json"
    )


def _inside(folder: Path, name: str) -> Path:
    if "/" in name or not (folder / name).is_file():
        raise UserError(f"{folder}: {name}, listed in the index, is missing")
    return folder / name


def plan_hugging_face(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out a Hugging Face model.

    Raises:
        UserError: no Hugging Face architecture supports the model.
    """
    architecture = architecture_for(source.model)
    rows = source.padded_vocab_size
    if source.model.vocab_size is not None and not options.keep_vocabulary_padding:
        rows = source.model.vocab_size
    placed: dict[str, tuple[Shape, torch.dtype]] = {}
    rules = architecture.expanded_rules(source.model)
    target_shapes = tensor_shapes(source.model, rows)
    for rule in rules:
        dtype = options.dtype_of(source.reads[rule.name])
        kinds = part_shapes(rule.layout, target_shapes[rule.name])
        placed |= {key: (shape, dtype) for key, shape in zip(rule.keys, kinds, strict=True)}
    files = _shards(placed, options.max_shard_size)
    slots = {key: slot for file in files for key, slot in file.slots.items()}
    writes = {
        rule.name: TensorWrite(
            rule.layout,
            [[slots[key]] for key in rule.keys],
            rows if rule.name in VOCABULARY else None,
        )
        for rule in rules
    }
    tokenizer = open_tokenizer(source, options, rows)
    keep = not tokenizer.overrides_eod and source.generation is not None
    exported = export_tokenizer(tokenizer, keep, rows)
    ids = tokenizer.token_ids(rows)
    text, changes = generation.resolve_generation(
        source.generation, ids, tokenizer.overrides_eod, rows
    )

    def finish(folder: Path, _: Checksums) -> None:
        for name, data in exported.files.items():
            (folder / name).write_bytes(data)
        write_json(folder / CONFIG, _config(architecture, source, options, rows, text.token_ids))
        write_json(folder / generation.FILE, text.config or {})
        if len(files) > 1:
            total = sum(slot.nbytes for slot in slots.values())
            weight_map = {key: slot.file for key, slot in sorted(slots.items())}
            write_json(
                folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

    notes = [*tokenizer.notes, *exported.notes]
    warnings = [*tokenizer.warnings, *exported.warnings, *changes]
    return OutputPlan(files, writes, finish, notes, warnings)


def _shards(placed: dict[str, tuple[Shape, torch.dtype]], limit: int) -> list[OutputFile]:
    """Distribute tensors over files of at most ``limit`` bytes, in order."""
    groups: list[dict[str, tuple[Shape, torch.dtype]]] = [{}]
    size = 0
    for key, (shape, dtype) in placed.items():
        nbytes = byte_count(shape, dtype)
        if groups[-1] and size + nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][key] = (shape, dtype)
        size += nbytes
    if len(groups) == 1:
        return [plan_safetensors("model.safetensors", groups[0])]
    return [
        plan_safetensors(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group)
        for n, group in enumerate(groups, 1)
    ]


def _config(
    architecture: HuggingFaceArchitecture,
    source: SourceCheckpoint,
    options: ConversionOptions,
    rows: int,
    ids: Mapping[str, Any],
) -> dict[str, Any]:
    """Return config.json with the keys of transformers 4.35 and those of 5."""
    dtype = _TORCH_NAMES[dtype_name(options.dtype or source.dtype)]
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
