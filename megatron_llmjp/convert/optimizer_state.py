"""AdamW's state in checkpoints: both moments and the fp32 weights, as canonical tensors.

A moment has the name, the shape and the layout of the weight it belongs to, so that every layout of
:mod:`tensors` holds for it. Source of the keys: megatron/core/optimizer/optimizer.py
(``sharded_state_dict`` of FP32Optimizer and Float16OptimizerWithFloat16Params) and
distrib_optimizer.py (``fully_reshardable``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.torch_dist import TensorEntry, TorchDistWriter
from megatron_llmjp.convert.formats.base import (
    ConversionOptions,
    SourceCheckpoint,
    check_tensor_names,
)
from megatron_llmjp.convert.formats.mcore_names import stored_key, tensor_reads
from megatron_llmjp.convert.optimizer_fragments import (
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
"""The fp32 weights that updates are added to, where the model's own are of another type."""

PREFIX = "optimizer.state."
"""Of its tensors' names in a conversion and in distributed checkpoints, before the kind."""

_MAIN_OF_PLAIN = "fp32_param"
"""What the optimizer that is not distributed calls them."""

_GROUP_IDENTITY = {"is_expert_parallel": False, "is_decoupled_lr": False, "lr_mult": 1.0}


@dataclass(frozen=True)
class OptimizerState:
    """What AdamW has gathered until now."""

    tensors: dict[str, dict[str, TensorRead]]
    """By kind, then by canonical name. The main weights are left out where the model is fp32."""
    step: int
    """Updates taken."""
    groups: list[dict[str, Any]]
    """The parameter groups' settings: with weight decay, and without."""
    scheduler: dict[str, Any]
    """State of megatron-core's OptimizerParamScheduler, which counts samples."""
    grad_scaler: dict[str, Any] | None = None
    """fp16: ``scale``, ``growth_tracker`` and ``hysteresis_tracker`` of the loss scale."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the parameter groups tell of AdamW, as fields of the configuration."""
        group = self.groups[0]
        found = {"adam_eps": group.get("eps")}
        if "betas" in group:
            found["adam_beta1"], found["adam_beta2"] = group["betas"]
        return {name: value for name, value in found.items() if value is not None}


def open_optimizer_state(source: SourceCheckpoint, options: ConversionOptions) -> SourceCheckpoint:
    """A checkpoint whose optimizer's state is open, and fits what is to be written.

    Weights that are to be fp32 are the main ones.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    state = read_optimizer_state(source)
    tensors = dict(state.tensors)
    scaler = state.grad_scaler
    if (options.dtype or source.dtype) == torch.float32 and MAIN_WEIGHTS in tensors:
        source = replace(source, reads=tensors.pop(MAIN_WEIGHTS)).check()
    if (options.dtype or source.dtype) != torch.float16:
        scaler = None
    state = replace(state, tensors=tensors, grad_scaler=scaler)
    return replace(source, optimizer=lambda: state)


def read_optimizer_state(source: SourceCheckpoint) -> OptimizerState:
    """The optimizer state of a checkpoint.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    if source.optimizer is None:
        raise UserError(
            f"{source.path}: --with-optimizer: no optimizer state is read from {source.format}; "
            "leave the flag out, and start a new run with --load OUTPUT --finetune"
        )
    state: OptimizerState = source.optimizer()
    return state


def optimizer_reads(
    source: SourceCheckpoint, state: OptimizerState, options: ConversionOptions
) -> dict[str, TensorRead]:
    """Every tensor that is carried over, by its name in the conversion.

    Raises:
        UserError: a weight lacks its state, or has one of another shape.
    """
    tensors = {MAIN_WEIGHTS: source.reads, **state.tensors}
    found = {}
    for kind in _kinds(source, state, options):
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
    """For each kind, what stands before a weight's name in the name of the tensor that fills it.

    Weights stand for the main ones where there are no others; without a state there is no more.
    """
    if source.optimizer is None:
        return {MAIN_WEIGHTS: ""}
    kinds = _kinds(source, read_optimizer_state(source), options)
    return {MAIN_WEIGHTS: "", **{kind: f"{PREFIX}{kind}." for kind in kinds}}


def weight_name(name: str) -> str:
    """The weight that a tensor of a conversion belongs to, or is."""
    return name.removeprefix(PREFIX).partition(".")[2] if name.startswith(PREFIX) else name


def add_optimizer_state(
    writer: TorchDistWriter,
    source: SourceCheckpoint,
    state: OptimizerState,
    options: ConversionOptions,
    rows: int,
) -> dict[str, TensorWrite]:
    """Make room for the optimizer's tensors, in fp32, beside a model with ``rows`` rows.

    Each optimizer of megatron-core finds the main weights under the name it expects: the further
    names mean the same bytes.
    """
    model = source.model
    keys = {name: stored_key(name) for name in tensor_shapes(model, rows)}
    kinds = _kinds(source, state, options)
    writes = {}
    for kind in kinds:
        for name, shape in tensor_shapes(model, rows).items():
            stored, index = keys[name]
            layer = None if index is None else (index, model.num_layers)
            placed = writer.add_tensor(f"{PREFIX}{kind}.{stored}", shape, torch.float32, layer)
            layout = partial(rectangular_parts, places=tuple(box for box, _ in placed))
            vocabulary = rows if name in VOCABULARY else None
            writes[f"{PREFIX}{kind}.{name}"] = TensorWrite(
                layout, [[slot] for _, slot in placed], vocabulary
            )
    for stored in dict.fromkeys(stored for stored, _ in keys.values()):
        main = f"{PREFIX}{MAIN_WEIGHTS}.{stored}"
        if MAIN_WEIGHTS not in kinds:
            writer.add_alias(main, stored)
        writer.add_alias(f"{PREFIX}{_MAIN_OF_PLAIN}.{stored}", main)
    return writes


def optimizer_common_state(state: OptimizerState) -> dict[str, Any]:
    """What goes beside the tensors, in the forms of the plain and the distributed optimizer."""
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
        scale = torch.tensor([state.grad_scaler["scale"]], dtype=torch.float32)
        optimizer["grad_scaler"] = {**state.grad_scaler, "scale": scale}
    return {"optimizer": optimizer, "opt_param_scheduler": state.scheduler}


def _kinds(
    source: SourceCheckpoint, state: OptimizerState, options: ConversionOptions
) -> tuple[str, ...]:
    """Kinds of tensors to write; fp32 weights are their own main weights."""
    fp32 = (options.dtype or source.dtype) == torch.float32
    return MOMENTS if fp32 and MAIN_WEIGHTS not in state.tensors else (*MOMENTS, MAIN_WEIGHTS)


def read_torch_dist_state(
    model: ModelConfig, entries: dict[str, TensorEntry], common_state: dict[str, Any], where: Path
) -> OptimizerState:
    """The state in a distributed checkpoint of Megatron-LM or of this project.

    Args:
        model: the architecture.
        entries: all tensors of the checkpoint.
        common_state: the content of ``common.pt``.
        where: the folder, for messages.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if has_buckets(iter(entries)):
        groups = read_param_groups(where)
        tensors = read_buckets(model, entries, common_state.get("args"), where)
        return make_optimizer_state(tensors, groups[0].get("step"), groups, common_state, where)
    kinds = {
        **{kind: kind for kind in MOMENTS},
        MAIN_WEIGHTS: MAIN_WEIGHTS,
        _MAIN_OF_PLAIN: MAIN_WEIGHTS,
    }
    tensors = {}
    for stored_kind, kind in kinds.items():
        prefix = f"{PREFIX}{stored_kind}."
        own = {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}
        if own and kind not in tensors:
            tensors[kind] = _reads(model, own)
    optimizer = common_state.get("optimizer")
    if not tensors or not isinstance(optimizer, dict):
        raise UserError(f"{where}: holds no optimizer state: saved with --no-save-optim?")
    inner = optimizer if "param_groups" in optimizer else optimizer["optimizer"]
    step = inner.get("state", {}).get("common_step", inner["param_groups"][0].get("step"))
    return make_optimizer_state(tensors, step, inner["param_groups"], common_state, where)


def _reads(model: ModelConfig, entries: dict[str, TensorEntry]) -> dict[str, TensorRead]:
    """How to read one kind of state, whole or cut into flat pieces of fragments."""
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
    """Put together what a checkpoint of Megatron-LM says of its optimizer.

    Raises:
        UserError: the number of updates or the schedule's state is missing.
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
    """A number that a file may hold as a tensor."""
    return value.read().item() if hasattr(value, "read") else value
