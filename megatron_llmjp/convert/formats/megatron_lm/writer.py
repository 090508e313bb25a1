"""Writer of Megatron-LM checkpoints: ``torch_dist``, or through ``legacy_writer.py`` ``torch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.config import LLAMA3_FIELDS
from megatron_llmjp.convert.formats.megatron_lm.legacy_writer import (
    iteration_folder,
    plan_legacy,
    write_tracker,
)
from megatron_llmjp.convert.formats.megatron_lm.optimizer_writer import add_model_and_optimizer
from megatron_llmjp.convert.formats.megatron_lm.pipeline_arguments import target_chunks
from megatron_llmjp.convert.formats.megatron_lm.written_arguments import checkpoint_arguments
from megatron_llmjp.convert.formats.rank_files import (
    check_parallel_sizes,
    target_padded_vocab_size,
)
from megatron_llmjp.convert.optimizer.random_states import RandomStates
from megatron_llmjp.convert.plan import Checksums, OutputPlan
from megatron_llmjp.errors import UserError


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
    target_chunks(source.model, options)  # checks the stages, on which torch_dist does not depend
    check_parallel_sizes(source.model, options.tensor_parallel)
    if options.with_optimizer and options.megatron_format == "torch":
        raise UserError(
            "--with-optimizer: --ckpt-format torch stores optimizer state without names, in the "
            "order of one optimizer class and one parallel layout; use --ckpt-format torch_dist"
        )
    if options.megatron_format == "torch_dist":
        output = _plan_torch_dist(source, options)
    else:
        output = plan_legacy(source, options)
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


def _plan_torch_dist(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    rows = target_padded_vocab_size(source.model, source.padded_vocab_size, options.tensor_parallel)
    iteration = source.iteration or 0
    folder = iteration_folder(iteration)
    writer = TorchDistWriter(options.max_shard_size, folder)
    layers = source.model.expert_layers
    names = mcore_names.LayerNames(
        stacked=all(layers) or not any(layers),
        fuses_experts_norm=options.transformer_impl == "local",
    )
    common: dict[str, Any] = {}
    notes: list[str] = []
    states = None
    if options.with_optimizer:
        writes, common = add_model_and_optimizer(writer, source, options, rows)
        states, notes = _target_random_states(source, options)
    else:
        writes = mcore_names.add_model_tensors(writer, source, options, rows, names)
    mcore_names.add_extra_states(writer, source.model, names)
    for key, shard in states.shards() if states is not None else ():
        writer.add_object(key, [shard])
    common |= {
        "args": checkpoint_arguments(source, options, rows, states),
        "checkpoint_version": 3.0,
        "iteration": iteration,
    }

    def finish(out: Path, _: Checksums) -> None:
        writer.finish(out / folder, common)
        write_tracker(out, iteration)

    return OutputPlan(writer.files, writes, finish, notes)


def _target_random_states(
    source: SourceCheckpoint, options: ConversionOptions
) -> tuple[RandomStates | None, list[str]]:
    """Return the random states that mean the same in the output, and notes for the resume."""
    states = None if source.random_states is None else source.random_states()
    sizes = f"TP {options.tensor_parallel} x PP {options.pipeline_parallel}"
    if states is None:
        reason = "the source has none"
    elif (states.tensor, states.pipeline) != (options.tensor_parallel, options.pipeline_parallel):
        reason = f"the source has those of TP {states.tensor} x PP {states.pipeline}, not {sizes}"
    elif not states.is_of_cuda:
        reason = "the source has those of a CPU"
    elif states.data > 1:
        return states, [
            f"random states of {states.data} data-parallel ranks were written: resume with "
            f"--data-parallel-random-init and a data parallel size of {states.data}"
        ]
    else:
        return states, []
    return None, [f"random states were not written ({reason}): resume with --no-load-rng"]
