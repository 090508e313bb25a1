"""AdamW's state in checkpoints: both moments and the fp32 main weights, as canonical tensors.

A moment has the name, the shape and the layout of its weight, so that all layouts of
:mod:`tensors` apply to it. Source of the keys: megatron/core/optimizer/optimizer.py
(``sharded_state_dict`` of FP32Optimizer and Float16OptimizerWithFloat16Params) and
distrib_optimizer.py (``fully_reshardable``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_dist import TensorEntry
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.formats.base import (
    ConversionOptions,
    SourceCheckpoint,
    check_tensor_names,
)
from megatron_llmjp.convert.formats.mcore_names import stored_key, tensor_reads
from megatron_llmjp.convert.optimizer.optimizer_fragments import (
    has_buckets,
    read_buckets,
    read_flat_fragments,
    read_param_groups,
)
from megatron_llmjp.convert.plan import TensorRead, TensorWrite
from megatron_llmjp.convert.tensors import (
    VOCABULARY,
    WORD_EMBEDDINGS,
    rectangular_parts,
    tensor_shapes,
)
from megatron_llmjp.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN_WEIGHTS = "param"
"""The fp32 main weights of the optimizer, if the model's weights have another type."""

PREFIX = "optimizer.state."
"""Prefix of the names of optimizer tensors, in a conversion and in distributed checkpoints."""

_PLAIN_MAIN_WEIGHTS = "fp32_param"
"""Kind of the main weights in the optimizer that is not distributed."""

_GROUP_IDENTITY = {"is_expert_parallel": False, "is_decoupled_lr": False, "lr_mult": 1.0}


@dataclass(frozen=True)
class OptimizerState:
    """State of AdamW, its parameter groups, the scheduler and the gradient scaler."""

    tensors: dict[str, dict[str, TensorRead]]
    """By kind, then by canonical name; without main weights if the model is fp32."""
    step: int
    """Number of updates."""
    groups: list[dict[str, Any]]
    """Settings of the parameter groups with and without weight decay."""
    scheduler: dict[str, Any]
    """State of megatron-core's OptimizerParamScheduler, in samples."""
    grad_scaler: dict[str, Any] | None = None
    """fp16: ``scale``, ``growth_tracker`` and ``hysteresis_tracker`` of the loss scale."""

    @property
    def settings(self) -> dict[str, Any]:
        """Hyperparameters of AdamW in the parameter groups, as fields of the configuration."""
        group = self.groups[0]
        found = {"adam_eps": group.get("eps")}
        if "betas" in group:
            found["adam_beta1"], found["adam_beta2"] = group["betas"]
        return {name: value for name, value in found.items() if value is not None}


def open_optimizer_state(source: SourceCheckpoint, options: ConversionOptions) -> SourceCheckpoint:
    """Return the checkpoint with its optimizer state opened, in the form to be written.

    If the output is fp32, the main weights replace the model's weights.

    Raises:
        UserError: the checkpoint has no optimizer state, or it is not supported.
    """
    state = read_optimizer_state(source)
    tensors = dict(state.tensors)
    scaler = state.grad_scaler
    if (options.dtype or source.dtype) == DType.float32 and MAIN_WEIGHTS in tensors:
        source = replace(source, reads=tensors.pop(MAIN_WEIGHTS)).check()
    if (options.dtype or source.dtype) != DType.float16:
        scaler = None
    state = replace(state, tensors=tensors, grad_scaler=scaler)
    return replace(source, optimizer=lambda: state)


def read_optimizer_state(source: SourceCheckpoint) -> OptimizerState:
    """Return the optimizer state of a checkpoint.

    Raises:
        UserError: the checkpoint has no optimizer state, or it is not supported.
    """
    if source.optimizer is None:
        raise UserError(
            f"{source.path}: --with-optimizer: reading optimizer state from {source.format} is not "
            "supported; omit the flag, and start a new run with --load OUTPUT --finetune"
        )
    if source.model.has_experts:
        raise UserError(
            f"{source.path}: --with-optimizer: the optimizer state of models with experts is not "
            "converted; omit the flag, and start a new run with --load OUTPUT --finetune"
        )
    state: OptimizerState = source.optimizer()
    return state


def optimizer_reads(
    source: SourceCheckpoint, state: OptimizerState, options: ConversionOptions
) -> dict[str, TensorRead]:
    """Return how to read all optimizer tensors, by their names in the conversion.

    Raises:
        UserError: the state of a weight is missing or has another shape.
    """
    tensors = {MAIN_WEIGHTS: source.reads, **state.tensors}
    found = {}
    for kind in state_kinds(source, state, options):
        where = Path(f"{source.path}, {kind} of the optimizer")
        check_tensor_names(where, source.reads, tensors.get(kind, {}))
        for name, weight in source.reads.items():
            read = tensors[kind][name]
            if read.shape != weight.shape:
                raise UserError(
                    f"{where}: {name} has shape {read.shape}, its weight has {weight.shape}"
                )
            read.check(name)
            found[f"{PREFIX}{kind}.{name}"] = read
    return found


def state_prefixes(source: SourceCheckpoint, options: ConversionOptions) -> dict[str, str]:
    """Return, by kind of state, the prefix of the conversion's tensor names.

    The model's weights (an empty prefix) replace missing main weights; without an optimizer state
    there are no other kinds.
    """
    if source.optimizer is None:
        return {MAIN_WEIGHTS: ""}
    kinds = state_kinds(source, read_optimizer_state(source), options)
    return {MAIN_WEIGHTS: "", **{kind: f"{PREFIX}{kind}." for kind in kinds}}


def weight_name(name: str) -> str:
    """Return the name of the weight of a conversion's tensor, without the prefix of its kind."""
    return name.removeprefix(PREFIX).partition(".")[2] if name.startswith(PREFIX) else name


def add_optimizer_state(
    writer: TorchDistWriter,
    source: SourceCheckpoint,
    state: OptimizerState,
    options: ConversionOptions,
    rows: int,
) -> dict[str, TensorWrite]:
    """Add the optimizer's tensors, in fp32, to a model with ``rows`` padded vocabulary rows.

    Each optimizer class of megatron-core expects the main weights under another key: all keys refer
    to the same bytes.
    """
    model = source.model
    keys = {name: stored_key(name) for name in tensor_shapes(model, rows)}
    kinds = state_kinds(source, state, options)
    writes = {}
    for kind in kinds:
        for name, shape in tensor_shapes(model, rows).items():
            stored, index = keys[name]
            lead = () if index is None else ((index, model.num_layers),)
            placed = writer.add_tensor(f"{PREFIX}{kind}.{stored}", shape, DType.float32, lead)
            layout = partial(rectangular_parts, places=tuple(box for box, _ in placed))
            vocabulary = rows if name in VOCABULARY else None
            writes[f"{PREFIX}{kind}.{name}"] = TensorWrite(
                layout, [[slot] for _, slot in placed], vocabulary
            )
    for stored in dict.fromkeys(stored for stored, _ in keys.values()):
        main = f"{PREFIX}{MAIN_WEIGHTS}.{stored}"
        if MAIN_WEIGHTS not in kinds:
            writer.add_alias(main, stored)
        writer.add_alias(f"{PREFIX}{_PLAIN_MAIN_WEIGHTS}.{stored}", main)
    return writes


def optimizer_common_state(state: OptimizerState) -> dict[str, Any]:
    """Return the common state, in the form of both the plain and the distributed optimizer."""
    groups = [
        {**_GROUP_IDENTITY, "default_config": True, **group, "step": state.step}
        for group in state.groups
    ]
    optimizer: dict[str, Any] = {
        "param_groups": groups,
        "optimizer": {"param_groups": groups},
        "param_state_sharding_type": "fully_reshardable",
    }
    if state.grad_scaler is not None:
        import torch

        scale = torch.tensor([state.grad_scaler["scale"]], dtype=torch.float32)
        optimizer["grad_scaler"] = {**state.grad_scaler, "scale": scale}
    return {"optimizer": optimizer, "opt_param_scheduler": state.scheduler}


def state_kinds(
    source: SourceCheckpoint, state: OptimizerState, options: ConversionOptions
) -> tuple[str, ...]:
    """Return the kinds of tensors to write; fp32 models have no separate main weights."""
    fp32 = (options.dtype or source.dtype) == DType.float32
    return MOMENTS if fp32 and MAIN_WEIGHTS not in state.tensors else (*MOMENTS, MAIN_WEIGHTS)


def read_torch_dist_state(
    model: ModelConfig, entries: dict[str, TensorEntry], common_state: dict[str, Any], where: Path
) -> OptimizerState:
    """Read the optimizer state of a distributed checkpoint of Megatron-LM or this project.

    Args:
        model: the architecture.
        entries: all tensors of the checkpoint.
        common_state: the content of ``common.pt``.
        where: the folder, for messages.

    Raises:
        UserError: there is no optimizer state, or it is not supported.
    """
    if has_buckets(iter(entries)):
        groups = read_param_groups(where)
        tensors = read_buckets(model, entries, common_state.get("args"), where)
        return make_optimizer_state(tensors, groups[0].get("step"), groups, common_state, where)
    kinds = {
        **{kind: kind for kind in MOMENTS},
        MAIN_WEIGHTS: MAIN_WEIGHTS,
        _PLAIN_MAIN_WEIGHTS: MAIN_WEIGHTS,
    }
    tensors = {}
    for stored_kind, kind in kinds.items():
        prefix = f"{PREFIX}{stored_kind}."
        own = {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}
        if own and kind not in tensors:
            tensors[kind] = _reads(model, own)
    optimizer = common_state.get("optimizer")
    if not tensors or not isinstance(optimizer, dict):
        raise UserError(f"{where}: contains no optimizer state (saved with --no-save-optim?)")
    inner = optimizer if "param_groups" in optimizer else optimizer["optimizer"]
    step = inner.get("state", {}).get("common_step", inner["param_groups"][0].get("step"))
    return make_optimizer_state(tensors, step, inner["param_groups"], common_state, where)


def _reads(model: ModelConfig, entries: dict[str, TensorEntry]) -> dict[str, TensorRead]:
    """Return how to read one kind of state, stored as tensors or as flat fragments."""
    embedding = entries[WORD_EMBEDDINGS].shape
    if len(embedding) == 2:
        return tensor_reads(model, embedding[0], entries)
    return read_flat_fragments(model, entries)


def make_optimizer_state(
    tensors: dict[str, dict[str, TensorRead]],
    step: Any,
    groups: list[dict[str, Any]],
    content: dict[str, Any],
    where: Path,
) -> OptimizerState:
    """Create the optimizer state from the content of a Megatron-LM checkpoint.

    Args:
        tensors: tensors by kind and canonical name.
        step: number of updates, as a number or a tensor.
        groups: the parameter groups.
        content: common state, with the scheduler's and the gradient scaler's state.
        where: the folder, for messages.

    Raises:
        UserError: the number of updates or the scheduler's state is missing.
    """
    scheduler = content.get("opt_param_scheduler")
    if step is None or not scheduler:
        raise UserError(f"{where}: its optimizer state lacks Adam's step or opt_param_scheduler")
    kept = ("wd_mult", "max_lr", "min_lr", "lr", "betas", "eps", "weight_decay")
    plain = [{key: group[key] for key in kept if key in group} for group in groups]
    optimizer = content.get("optimizer")
    scaler = optimizer.get("grad_scaler") if isinstance(optimizer, dict) else None
    if scaler is not None:
        scaler = {**scaler, "scale": float(to_number(scaler["scale"]))}
    return OptimizerState(tensors, int(to_number(step)), plain, dict(scheduler), scaler)


def to_number(value: Any) -> Any:
    """Return a number that may be stored as a tensor."""
    return value.read().item() if hasattr(value, "read") else value
