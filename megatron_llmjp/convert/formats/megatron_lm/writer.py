"""Writer of Megatron-LM checkpoints in both formats, which ``reader.py`` describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import folder_name
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.config import LLAMA3_FIELDS
from megatron_llmjp.convert.formats.megatron_lm.arguments import make_args
from megatron_llmjp.convert.formats.megatron_lm.reader import FILE, TRACKER
from megatron_llmjp.convert.formats.rank_files import (
    check_parallel_sizes,
    rank_shape,
    rank_write,
    target_padded_vocab_size,
)
from megatron_llmjp.convert.plan import Checksums, OutputPlan, Slot
from megatron_llmjp.convert.tensors import (
    FINAL_NORM,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    tensor_shapes,
)
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import write_atomically


def plan_megatron_lm(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out a checkpoint that Megatron-LM loads with ``--load OUT --finetune``.

    Raises:
        UserError: Megatron-LM does not support the model.
    """
    if source.model.use_parallel_residual:
        raise UserError(f"{source.path}: Megatron-LM has no layer with a parallel residual")
    if source.model.position_embedding_type == "yarn":
        raise UserError(f"{source.path}: YaRN is not supported for Megatron-LM")
    changed = [name for name in LLAMA3_FIELDS.values() if _is_changed(source.model, name)]
    if source.model.use_rope_scaling and changed:
        raise UserError(
            f"{source.path}: Megatron-LM has LLaMA 3.1's constants built in, and no argument for "
            + ", ".join(f"{name} {getattr(source.model, name)}" for name in changed)
        )
    plan_format = _plan_torch_dist if options.megatron_format == "torch_dist" else _plan_legacy
    output = plan_format(source, options)
    output.notes += _notes(source.model)
    return output


def _is_changed(model: ModelConfig, field: str) -> bool:
    return bool(getattr(model, field) != ModelConfig.model_fields[field].default)


def _notes(model: ModelConfig) -> list[str]:
    """Return notes on changes to pretrain_gpt.py that Megatron-LM needs for the model."""
    missing = []
    if model.use_rope_scaling and model.rope_scaling_factor != 8.0:
        missing.append(f"rope_scaling_factor={model.rope_scaling_factor}")
    if model.rotary_seq_len_interpolation_factor is not None:
        missing.append(f"seq_len_interpolation_factor={model.rotary_seq_len_interpolation_factor}")
    return [
        f"pretrain_gpt.py of Megatron-LM up to core 0.19 has the flag but does not pass it to the "
        f"model: add {argument} to its GPTModel(...)"
        for argument in missing
    ]


def _args(source: SourceCheckpoint, options: ConversionOptions, rows: int) -> Any:
    model = source.model
    grouped = model.query_groups != model.num_attention_heads
    extra = {
        "group_query_attention": grouped,
        "num_query_groups": model.query_groups if grouped else 1,
        "position_embedding_type": model.position_embedding_type,
        "add_position_embedding": True,  # Megatron-LM's default for both kinds
        "rotary_base": model.rotary_base,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor,
        "use_rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "normalization": model.normalization,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": False,
        "num_experts": None,
        "transformer_impl": options.transformer_impl,
        "use_mcore_models": True,
        "ckpt_format": options.megatron_format,
        "iteration": source.iteration or 0,
    }
    if source.tokenizer_type is not None:
        extra["tokenizer_type"] = source.tokenizer_type
    if model.vocab_size is not None:
        extra["true_vocab_size"] = model.vocab_size
    dtype = options.dtype or source.dtype
    sizes = options.tensor_parallel, options.pipeline_parallel
    return make_args(model, rows, dtype, *sizes, extra)


def _plan_torch_dist(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    rows = target_padded_vocab_size(source.model, source.padded_vocab_size, options.tensor_parallel)
    iteration = source.iteration or 0
    folder = _folder(iteration)
    writer = torch_dist.TorchDistWriter(options.max_shard_size, folder)
    writes = mcore_names.add_model_tensors(writer, source, options, rows)
    mcore_names.add_extra_states(writer, source.model)
    common = {
        "args": _args(source, options, rows),
        "checkpoint_version": 3.0,
        "iteration": iteration,
    }

    def finish(out: Path, _: Checksums) -> None:
        writer.finish(out / folder, common)
        _write_tracker(out, iteration)

    return OutputPlan(writer.files, writes, finish, prepare=writer.metadata)


def _folder(iteration: int) -> str:
    """Return the folder name; Megatron-LM does not load iteration 0, but a ``release``."""
    return folder_name(iteration) if iteration else "release"


def _write_tracker(out: Path, iteration: int) -> None:
    write_atomically(out / TRACKER, str(iteration) if iteration else "release")


def _plan_legacy(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    model, tensor, pipeline = source.model, options.tensor_parallel, options.pipeline_parallel
    check_parallel_sizes(model, tensor, pipeline)
    rows = target_padded_vocab_size(model, source.padded_vocab_size, tensor)
    iteration = source.iteration or 0
    local = {
        name: _placed(name, model.num_layers // pipeline, pipeline, options)
        for name in tensor_shapes(model, rows)
    }
    if not model.untie_embeddings_and_output_weights and pipeline > 1:
        local[WORD_EMBEDDINGS].append((pipeline - 1, OUTPUT_LAYER))
    files = []
    slots: dict[str, dict[int, list[Slot]]] = {name: {} for name in local}
    for t in range(tensor):
        for p in range(pipeline):
            tree: dict[str, Any] = {}
            for name, shape in tensor_shapes(model, rows).items():
                held = rank_shape(name, model, shape, tensor)
                dtype = options.dtype_of(source.reads[name])
                tree |= {
                    key: TensorPlaceholder(key, held, dtype)
                    for stage, key in local[name]
                    if stage == p
                }
            content = {
                "args": _args(source, options, rows),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "model": _with_extra_states(tree, options),
            }
            rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "")
            file = plan_archive(f"{_folder(iteration)}/{rank}/{FILE}", content)
            files.append(file)
            for name, places in local.items():
                slots[name].setdefault(t, []).extend(
                    file.slots[key] for stage, key in places if stage == p
                )
    writes = {name: rank_write(name, model, tensor, slots[name], rows) for name in local}
    return OutputPlan(files, writes, lambda out, _: _write_tracker(out, iteration))


def _placed(
    name: str, per_stage: int, pipeline: int, options: ConversionOptions
) -> list[tuple[int, str]]:
    """Return the stages that store a tensor, with its key there."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        stage, layer = divmod(int(match[1]), per_stage)
        inner = match[2]
        if options.transformer_impl == "transformer_engine":
            for plain, fused in mcore_names.FUSED_NORMS.items():
                inner = inner.replace(plain, fused)
        return [(stage, f"decoder.layers.{layer}.{inner}")]
    return [(0 if name.startswith("embedding.") else pipeline - 1, name)]


def _with_extra_states(tree: dict[str, Any], options: ConversionOptions) -> dict[str, Any]:
    """Add the empty extra states of linear layers, and of Transformer Engine's final norm."""
    final = f"{FINAL_NORM}.weight"
    has_norm = options.transformer_impl == "transformer_engine"
    found: dict[str, Any] = {}
    for key, placeholder in tree.items():
        found[key] = placeholder
        if (".linear_" in key and key.endswith(".weight")) or (has_norm and key == final):
            found[key.removesuffix("weight") + "_extra_state"] = None
    return found
