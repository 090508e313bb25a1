"""The Hugging Face format: a folder with config.json and safetensors shards.

What differs between architectures is in ``hf_llama.py``, ``hf_gpt2.py`` and ``hf_gpt_neox.py``;
each is a :class:`HuggingFaceArchitecture`.
"""

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
from megatron_llmjp.convert.formats.hugging_face import generation, gpt2, gpt_neox, llama
from megatron_llmjp.convert.formats.hugging_face.config import (
    HuggingFaceArchitecture,
    read_json,
    write_json,
)
from megatron_llmjp.convert.formats.hugging_face.tokenizer import export_tokenizer
from megatron_llmjp.convert.model_tokenizer import open_tokenizer
from megatron_llmjp.convert.plan import Checksums, OutputFile, OutputPlan, TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import VOCABULARY, Shape, part_shapes, tensor_shapes
from megatron_llmjp.errors import UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def styles() -> dict[str, HuggingFaceArchitecture]:
    """The known architectures by ``model_type``."""
    return {s.model_type: s for s in (llama.ARCHITECTURE, gpt2.ARCHITECTURE, gpt_neox.ARCHITECTURE)}


def architecture_for(model: ModelConfig) -> HuggingFaceArchitecture:
    """The architecture that holds a model.

    Raises:
        UserError: none does; with the reasons of each.
    """
    reasons = []
    for style in styles().values():
        why = style.refusals(model)
        if not why:
            return style
        reasons.append(f"  {style.architecture}: {'; '.join(why)}")
    raise UserError("no Hugging Face architecture holds this model\n" + "\n".join(reasons))


def read_checkpoint(path: Path) -> SourceCheckpoint:
    """Open a Hugging Face folder.

    Raises:
        UserError: a file is missing or damaged, or the model cannot be represented.
    """
    config = read_json(path / CONFIG)
    style = styles().get(config.get("model_type", ""))
    if style is None:
        raise UserError(
            f"{path / CONFIG}: model_type {config.get('model_type')!r} cannot be converted; "
            f"possible: {', '.join(styles())}"
        )
    _refuse_quantized(config, path / CONFIG)
    model = style.from_config(config, str(path / CONFIG))
    tensors = {k: v for k, v in _tensors(path).items() if not style.ignored.search(k)}
    if (
        style is gpt2.ARCHITECTURE and "wte.weight" in tensors
    ):  # saved from GPT2Model, as the original
        tensors = {
            k if k.startswith("lm_head.") else f"transformer.{k}": v for k, v in tensors.items()
        }
    rules = style.expanded(model)
    replicas = _tied_copies(style, model, tensors)
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
    """Refuse weights that are codes with scales beside them, which only its method decodes."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    raise UserError(
        f"{where}: quantization_config (quant_method {method!r}): the weights are quantized, and "
        "only unquantized ones can be converted: take the model it was made from, or dequantize "
        "it with transformers (model.dequantize()) and save that"
    )


def _tied_copies(
    style: HuggingFaceArchitecture, model: ModelConfig, tensors: dict[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, ...]]:
    """Take the head out of a tied model's tensors, to be compared with the embedding."""
    if model.untie_embeddings_and_output_weights:
        return {}
    untied = model.model_copy(update={"untie_embeddings_and_output_weights": True})
    rules = {rule.name: rule for rule in style.rules(untied)}
    head = rules["output_layer.weight"].keys[0]
    copy = tensors.pop(head, None)
    return {} if copy is None else {"embedding.word_embeddings.weight": (copy,)}


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by key, from the files that transformers would take."""
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
    raise UserError(f"{path}: holds neither model.safetensors nor {INDEX}")


def _inside(folder: Path, name: str) -> Path:
    if "/" in name or not (folder / name).is_file():
        raise UserError(f"{folder}: the index names {name}, which is not there")
    return folder / name


def plan_output(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out a Hugging Face folder.

    Raises:
        UserError: no architecture of Hugging Face holds the model.
    """
    style = architecture_for(source.model)
    rows = source.padded_vocab_size
    if source.model.vocab_size is not None and not options.keep_vocabulary_padding:
        rows = source.model.vocab_size
    placed: dict[str, tuple[Shape, torch.dtype]] = {}
    rules = style.expanded(source.model)
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
    keep = not tokenizer.decides and source.generation is not None
    exported = export_tokenizer(tokenizer, keep, rows)
    ids = tokenizer.token_ids(rows)
    text, changes = generation.resolve_generation(source.generation, ids, tokenizer.decides, rows)

    def finish(folder: Path, _: Checksums) -> None:
        for name, data in exported.files.items():
            (folder / name).write_bytes(data)
        write_json(folder / CONFIG, _config(style, source, options, rows, text.token_ids))
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
    style: HuggingFaceArchitecture,
    source: SourceCheckpoint,
    options: ConversionOptions,
    rows: int,
    ids: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json with the keys that transformers 4.35 reads and those that 5 reads."""
    dtype = _TORCH_NAMES[dtype_name(options.dtype or source.dtype)]
    return {
        "architectures": [style.architecture],
        "model_type": style.model_type,
        **style.to_config(source.model),
        "vocab_size": rows,
        "tie_word_embeddings": not source.model.untie_embeddings_and_output_weights,
        # Unknown ids are said to be so: the classes' defaults would name other tokens.
        **{"bos_token_id": None, "eos_token_id": None, **ids},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
