"""Writer of Megatron-DeepSpeed checkpoints: layer files, rank files and optional ZeRO files.

The names are those of ``names.py``; the content that the loaders require is defined in DeepSpeed's
runtime/engine.py (``_load_checkpoint``) and checkpoint/deepspeed_checkpoint.py.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.megatron_deepspeed import zero_writer
from megatron_llmjp.convert.formats.megatron_deepspeed.reader import LATEST
from megatron_llmjp.convert.formats.megatron_deepspeed.stages import check_stages, stage_layers
from megatron_llmjp.convert.formats.megatron_lm.arguments import make_args, run_arguments
from megatron_llmjp.convert.formats.rank_files import (
    OLD_NAMES,
    check_parallel_sizes,
    rank_shape,
    rank_write,
    target_padded_vocab_size,
)
from megatron_llmjp.convert.optimizer import optimizer_state
from megatron_llmjp.convert.plan import Checksums, OutputPlan, Slot
from megatron_llmjp.convert.tensors import (
    FINAL_NORM,
    LAYER,
    OUTPUT_LAYER,
    POSITION_EMBEDDINGS,
    WORD_EMBEDDINGS,
    norm_parameters,
    tensor_shapes,
)
from megatron_llmjp.errors import UserError


def plan_megatron_deepspeed(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out a checkpoint that Megatron-DeepSpeed loads with ``--finetune``.

    Raises:
        UserError: Megatron-DeepSpeed does not support the model.
    """
    check_parallel_sizes(source.model, options.tensor_parallel)
    check_stages(source.model, options)
    _check_expressible(source.model)
    if options.no_pipeline:
        return _plan_modules(source, options)
    return _plan_layers(source, options)


def _plan_modules(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out one file per tensor-parallel rank, for ``--no-pipeline-parallel``."""
    if options.pipeline_parallel > 1 or options.with_optimizer:
        raise UserError(
            "--no-pipeline cannot be combined with --target-pipeline-parallel-size or "
            "--with-optimizer"
        )
    model, tensor = source.model, options.tensor_parallel
    rows = target_padded_vocab_size(model, source.padded_vocab_size, tensor)
    tag = _tag(source)
    files = []
    slots: dict[str, dict[int, list[Slot]]] = {name: {} for name in source.reads}
    for t in range(tensor):
        held = {
            name: TensorPlaceholder(
                name, rank_shape(name, model, shape, tensor), options.dtype_of(source.reads[name])
            )
            for name, shape in tensor_shapes(model, rows).items()
        }
        content = _rank_content(source, options, rows) | {"module": _module(model, held)}
        file = plan_archive(f"{tag}/mp_rank_{t:02d}_model_states.pt", content)
        files.append(file)
        for name in held:
            slots[name][t] = [file.slots[name]]
    writes = {name: rank_write(name, model, tensor, slots[name], rows) for name in source.reads}
    return OutputPlan(files, writes, lambda folder, _: _write_trackers(folder, source))


def _module(model: ModelConfig, held: dict[str, TensorPlaceholder]) -> dict[str, Any]:
    """Return the nested state of Megatron-DeepSpeed's GPTModel."""
    embedding = {"word_embeddings": {"weight": held[WORD_EMBEDDINGS]}}
    if POSITION_EMBEDDINGS in held:
        embedding["position_embeddings"] = {"weight": held[POSITION_EMBEDDINGS]}
    encoder: OrderedDict[str, TensorPlaceholder] = OrderedDict()
    last = model.num_layers + 2
    for number, names in _layer_files(model).items():
        module = "final_layernorm" if number == last else f"layers.{number - 2}"
        if 2 <= number <= last:
            encoder |= {f"{module}.{key}": held[name] for name, key in names.items()}
    language: dict[str, Any] = {"embedding": embedding, "encoder": encoder}
    if OUTPUT_LAYER in held:
        language["output_layer"] = {"weight": held[OUTPUT_LAYER]}
    return {"language_model": language}


def _tag(source: SourceCheckpoint) -> str:
    return f"global_step{source.iteration or 0}"


def _write_trackers(folder: Path, source: SourceCheckpoint) -> None:
    (folder / LATEST).write_text(_tag(source), encoding="utf-8")
    iteration = str(source.iteration or 0)
    (folder / "latest_checkpointed_iteration.txt").write_text(iteration, encoding="utf-8")


def _plan_layers(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out one file per layer and tensor-parallel rank."""
    model, tensor = source.model, options.tensor_parallel
    rows = target_padded_vocab_size(model, source.padded_vocab_size, tensor)
    tag = _tag(source)
    groups = _layer_files(model)
    shape_of = tensor_shapes(model, rows)
    files, optimizers = [], []
    slots: dict[str, dict[int, list[Slot]]] = {}
    for number, names in groups.items():
        for t in range(tensor):
            tree = {}
            for name, key in names.items():
                shape = rank_shape(name, model, shape_of[name], tensor)
                tree[key] = TensorPlaceholder(key, shape, options.dtype_of(source.reads[name]))
            path = f"{tag}/layer_{number:02d}-model_{t:02d}-model_states.pt"
            file = plan_archive(path, tree)
            files.append(file)
            for name, key in names.items():
                slots.setdefault(name, {})[t] = [file.slots[key]]
    for rank in range(tensor * options.pipeline_parallel):
        content = _rank_content(source, options, rows)
        if options.with_optimizer:
            stage = _stage(groups, rank // tensor, options.pipeline_parallel, model)
            optimizer = _optimizer_file(source, options, stage, rank, rows)
            content["param_shapes"] = optimizer.param_shapes
            content["lr_scheduler"] = optimizer.scheduler
            optimizers.append(optimizer)
            for kind, prefix in optimizer_state.state_prefixes(source, options).items():
                for name, slot in optimizer.slots[kind].items():
                    ranks = slots.setdefault(prefix + name, {})
                    ranks.setdefault(rank % tensor, []).append(slot)
        files.append(plan_archive(f"{tag}/mp_rank_{rank:02d}_model_states.pt", content))

    def finish(folder: Path, sums: Checksums) -> None:
        for optimizer in optimizers:
            kinds = optimizer_state.state_prefixes(source, options)
            zero_writer.write_checksums(folder, optimizer, kinds, sums)
        _write_trackers(folder, source)

    writes = {
        name: rank_write(optimizer_state.weight_name(name), model, tensor, own, rows)
        for name, own in slots.items()
    }
    files += [optimizer.file for optimizer in optimizers]
    return OutputPlan(files, writes, finish)


def _optimizer_file(
    source: SourceCheckpoint,
    options: ConversionOptions,
    stage: dict[int, dict[str, str]],
    rank: int,
    rows: int,
) -> zero_writer.OptimizerFile:
    """Lay out the optimizer file of one rank, with the parameters of the layer files ``stage``."""
    model, tensor = source.model, options.tensor_parallel
    names = zero_writer.parameter_names(stage, model)
    shape_of = tensor_shapes(model, rows)
    held = {name: rank_shape(name, model, shape_of[name], tensor) for name in names}
    dtype = options.dtype or source.dtype
    prefix = "bf16_" if dtype == DType.bfloat16 else ""
    path = f"{_tag(source)}/{prefix}zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
    found = None if source.optimizer is None else optimizer_state.read_optimizer_state(source)
    return zero_writer.plan_optimizer_file(path, names, held, dtype, found)


def _check_expressible(model: ModelConfig) -> None:
    problems = []
    if model.is_rotary and model.rotary_base != 10000:
        problems.append(f"rotary_base {model.rotary_base}: Megatron-DeepSpeed supports only 10000")
    yarn = model.position_embedding_type == "yarn"
    if yarn or model.use_rope_scaling or model.rotary_seq_len_interpolation_factor is not None:
        problems.append("scaled rotary embeddings")
    if model.use_parallel_residual:
        problems.append("parallel residual")
    if model.has_experts:
        problems.append("experts (num_moe_experts)")
    if model.qk_layernorm:
        problems.append("normalized queries and keys (qk_layernorm)")
    if model.add_qkv_bias and not model.add_bias_linear:
        problems.append("add_qkv_bias: linear layers have biases in all or none")
    if problems:
        raise UserError("megatron-deepspeed does not support this model: " + "; ".join(problems))


def _layer_files(model: ModelConfig) -> dict[int, dict[str, str]]:
    """Return names and keys of every layer file, numbered as since July 2023."""
    first = {WORD_EMBEDDINGS: "word_embeddings.weight"}
    if model.position_embedding_type == "learned_absolute":
        first[POSITION_EMBEDDINGS] = "position_embeddings.weight"
    files = {1: first}
    old = {new: name for name, new in OLD_NAMES.items()}
    names = tensor_shapes(model, 1)
    for i in range(model.num_layers):
        prefix = LAYER.format(i=i)
        inner = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
        files[i + 2] = {
            prefix + n: f"{old[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}" for n in inner
        }
    last = model.num_layers + 2
    files[last] = {f"{FINAL_NORM}.{kind}": kind for kind in norm_parameters(model)}
    if model.untie_embeddings_and_output_weights:
        files[last + 1] = {OUTPUT_LAYER: "lm_head.weight"}
    return files


def _stage(
    groups: dict[int, dict[str, str]], stage: int, stages: int, model: ModelConfig
) -> dict[int, dict[str, str]]:
    """Return the layer files of one pipeline stage; the last one also has a tied embedding."""
    layers = stage_layers(model.num_layers, stages)[stage]
    found = {}
    for number, names in groups.items():
        layer = min(max(number - 2, 0), model.num_layers - 1)
        tied_copy = number == 1 and not model.untie_embeddings_and_output_weights
        if layer in layers or (tied_copy and stage == stages - 1):
            found[number] = names
    return found


def _universal_info(model: ModelConfig, rows: int) -> dict[str, Any]:
    """Return the patterns of parameter names that ``ds_to_universal`` requires."""
    tied = not model.untie_embeddings_and_output_weights
    learned = model.position_embedding_type == "learned_absolute"
    root = r"tied_modules.embed" if tied else r"\d+"
    kinds = norm_parameters(model)
    replicated = [
        rf"\d+.{norm}.{kind}"
        for kind in kinds
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    replicated += [rf"\d+.{kind}" for kind in kinds]
    positions = [f"{root}.position_embeddings.weight"] if learned else []
    words = [f"{root}.word_embeddings.weight"]
    if model.add_bias_linear:
        replicated += [r"\d+.self_attention.dense.bias", r"\d+.mlp.dense_4h_to_h.bias"]
    swiglu = model.activation_function == "swiglu"
    return {
        "universal_checkpoint_version": 0.4,
        "original_vocab_size": model.vocab_size or rows,
        "padded_vocab_size": rows,
        "vocabulary_parameter_patterns": words + ([] if tied else [r"\d+.lm_head.weight"]),
        "pipeline_replicated_parameter_patterns": words + positions if tied else [],
        "tp_replicated_parameter_patterns": replicated + positions,
        "parameter_with_row_parallelism_patterns": [
            r"\d+.mlp.dense_4h_to_h.weight",
            r"\d+.self_attention.dense.weight",
        ],
        "parameter_with_2_sub_params_cat_dim_0": (
            [r"\d+.mlp.dense_h_to_4h.weight"] if swiglu else []
        ),
    }


def _rank_content(
    source: SourceCheckpoint, options: ConversionOptions, rows: int
) -> dict[str, Any]:
    """Return the content of a rank file that DeepSpeed's engine and Megatron require."""
    model, tensor, stages = source.model, options.tensor_parallel, options.pipeline_parallel
    iteration, samples = source.iteration or 0, source.consumed_samples or 0
    rope = model.position_embedding_type == "rope"
    extra = {
        "num_key_value_heads": model.query_groups,
        "add_position_embedding": not rope,
        "normalization": model.normalization.lower(),
        "num_experts": [1],
        "iteration": iteration,
        "consumed_train_samples": samples,
        "no_pipeline_parallel": options.no_pipeline,
        "deepspeed": True,
    }
    extra |= run_arguments(source)
    extra.pop("true_vocab_size", None)  # in universal_checkpoint_info
    dtype = options.dtype or source.dtype
    return {
        "module": None,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": samples,
        "dp_world_size": 1,
        "mp_world_size": tensor * stages,
        "ds_config": {},
        "ds_version": "0.10.0",
        "args": make_args(model, rows, dtype, tensor, stages, extra),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "tokens": 0,
        "universal_checkpoint_info": _universal_info(model, rows),
    }
