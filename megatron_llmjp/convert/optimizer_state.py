"""AdamW's state in checkpoints: both moments and the fp32 weights, as canonical tensors.

A moment has the name, the shape and the layout of the weight it belongs to, so that every layout of
:mod:`tensors` holds for it. Source of the keys: megatron/core/optimizer/optimizer.py
(``sharded_state_dict`` of FP32Optimizer and Float16OptimizerWithFloat16Params) and
distrib_optimizer.py (``fully_reshardable``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.dcp import StoredEntry, Writer
from megatron_llmjp.convert.formats import Options, Source, account
from megatron_llmjp.convert.mcore_names import on_disk, reads
from megatron_llmjp.convert.plan import Read, Write
from megatron_llmjp.convert.storage import Stored
from megatron_llmjp.convert.tensors import VOCABULARY, WORD_EMBEDDINGS, boxes, shapes
from megatron_llmjp.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"
"""The fp32 weights that updates are added to, where the model's own are of another type."""

_PREFIX = "optimizer.state."
_MAIN_OF_PLAIN = "fp32_param"
"""What the optimizer that is not distributed calls them."""

_GROUP_IDENTITY = {"is_expert_parallel": False, "is_decoupled_lr": False, "lr_mult": 1.0}


@dataclass(frozen=True)
class OptimizerState:
    """What AdamW has gathered until now."""

    tensors: dict[str, dict[str, Read]]
    """By kind, then by canonical name. The main weights are left out where the model is fp32."""
    step: int
    """Updates taken."""
    groups: list[dict[str, Any]]
    """The parameter groups' settings: with weight decay, and without."""
    scheduler: dict[str, Any]
    """State of megatron-core's OptimizerParamScheduler, which counts samples."""


def of_source(source: Source) -> OptimizerState:
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


def reads_of(source: Source, state: OptimizerState, options: Options) -> dict[str, Read]:
    """Every tensor that is carried over, by its name in the conversion.

    Raises:
        UserError: a weight lacks its state, or has one of another shape.
    """
    tensors = {MAIN: source.reads, **state.tensors}
    found = {}
    for kind in _kinds(source, state, options):
        where = Path(f"{source.path}, {kind} of the optimizer")
        account(where, source.reads, tensors.get(kind, {}))
        for name, weight in source.reads.items():
            read = tensors[kind][name]
            if read.shape != weight.shape:
                raise UserError(
                    f"{where}: {name} has shape {read.shape}, its weight has {weight.shape}"
                )
            read.check(name)
            found[f"{_PREFIX}{kind}.{name}"] = read
    return found


def add_state(
    writer: Writer, source: Source, state: OptimizerState, options: Options, rows: int
) -> dict[str, Write]:
    """Make room for the optimizer's tensors, in fp32, beside a model with ``rows`` rows.

    Each optimizer of megatron-core finds the main weights under the name it expects: the further
    names mean the same bytes.
    """
    model = source.model
    keys = {name: on_disk(name) for name in shapes(model, rows)}
    kinds = _kinds(source, state, options)
    writes = {}
    for kind in kinds:
        for name, shape in shapes(model, rows).items():
            stored, index = keys[name]
            layer = None if index is None else (index, model.num_layers)
            placed = writer.add_tensor(f"{_PREFIX}{kind}.{stored}", shape, torch.float32, layer)
            layout = partial(boxes, places=tuple(box for box, _ in placed))
            vocabulary = rows if name in VOCABULARY else None
            writes[f"{_PREFIX}{kind}.{name}"] = Write(
                layout, [[slot] for _, slot in placed], vocabulary
            )
    for stored in dict.fromkeys(stored for stored, _ in keys.values()):
        main = f"{_PREFIX}{MAIN}.{stored}"
        if MAIN not in kinds:
            writer.add_alias(main, stored)
        writer.add_alias(f"{_PREFIX}{_MAIN_OF_PLAIN}.{stored}", main)
    return writes


def common(state: OptimizerState) -> dict[str, Any]:
    """What goes beside the tensors, in the forms of the plain and the distributed optimizer."""
    groups = [
        {**_GROUP_IDENTITY, "default_config": True, **group, "step": state.step}
        for group in state.groups
    ]
    return {
        "optimizer": {
            "param_groups": groups,
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": "fully_reshardable",
        },
        "opt_param_scheduler": state.scheduler,
    }


def _kinds(source: Source, state: OptimizerState, options: Options) -> tuple[str, ...]:
    """Kinds of tensors to write; fp32 weights are their own main weights."""
    fp32 = (options.dtype or source.dtype) == torch.float32
    return MOMENTS if fp32 and MAIN not in state.tensors else (*MOMENTS, MAIN)


def from_torch_dist(
    model: ModelConfig, entries: dict[str, StoredEntry], common_state: dict[str, Any], where: Path
) -> OptimizerState:
    """The state in a distributed checkpoint of Megatron-LM or of this project.

    Args:
        model: the architecture.
        entries: all tensors of the checkpoint.
        common_state: the content of ``common.pt``.
        where: the folder, for messages.

    Raises:
        UserError: there is none, or it is cut by buckets instead of by tensors.
    """
    if any(key.startswith("optimizer.distributed.") for key in entries):
        raise UserError(
            f"{where}: its optimizer state is cut by buckets of its own run; load it there and "
            "save it with --dist-ckpt-optim-fully-reshardable"
        )
    kinds = {**{kind: kind for kind in MOMENTS}, MAIN: MAIN, _MAIN_OF_PLAIN: MAIN}
    tensors: dict[str, dict[str, Read]] = {}
    for stored_kind, kind in kinds.items():
        prefix = f"{_PREFIX}{stored_kind}."
        own = {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}
        if own and kind not in tensors:
            tensors[kind] = reads(model, own[WORD_EMBEDDINGS].shape[0], own)
    optimizer = common_state.get("optimizer")
    if not tensors or not isinstance(optimizer, dict):
        raise UserError(f"{where}: holds no optimizer state: saved with --no-save-optim?")
    inner = optimizer if "param_groups" in optimizer else optimizer["optimizer"]
    step = inner.get("state", {}).get("common_step", inner["param_groups"][0].get("step"))
    return make_state(tensors, step, inner["param_groups"], common_state, where)


def make_state(
    tensors: dict[str, dict[str, Read]],
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
    count = int(step.read()) if hasattr(step, "read") else int(step)
    return OptimizerState(tensors, count, plain, dict(scheduler))


class RankState(NamedTuple):
    """The optimizer state of one rank's file, by the model chunk and the key of the weight."""

    chunks: dict[str, list[dict[str, Stored]]]
    """By kind: one dictionary per model chunk, with the keys of the weights."""
    step: Any
    groups: list[dict[str, Any]]


def of_rank(content: dict[str, Any], chunks: list[dict[str, Any]], path: Path) -> RankState:
    """Give the numbered states in a rank's file the names of their weights.

    megatron-core numbers parameters group by group: the ones with weight decay and those without,
    in an order that is the rank's own, and inside a group as the model lists them
    (megatron/core/optimizer/__init__.py, ``_get_param_groups``).

    Raises:
        UserError: there is no state, it lies in another file, or the numbers do not fit.
    """
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, dict):
        raise UserError(f"{path}: holds no optimizer state: saved with --no-save-optim?")
    inner = optimizer.get("optimizer", optimizer)
    if not inner.get("state"):
        raise UserError(
            f"{path}: its optimizer state is in distrib_optim.pt, flat and cut by buckets; load "
            "it with Megatron-LM and save it with --ckpt-format torch_dist"
        )
    weights = [(i, key) for i, chunk in enumerate(chunks) for key in chunk]
    found: dict[str, list[dict[str, Stored]]] = {}
    masters = optimizer.get("fp32_from_fp16_params")
    for number, group in enumerate(inner["param_groups"]):
        decays = bool(group.get("wd_mult", 1.0))
        names = [(i, key) for i, key in weights if _decays(key, chunks[i][key]) == decays]
        if len(names) != len(group["params"]):
            raise UserError(
                f"{path}: a parameter group holds {len(group['params'])} states for {len(names)} "
                f"weights {'with' if decays else 'without'} weight decay"
            )
        states = [inner["state"][index] for index in group["params"]]
        parts = {kind: [state[kind] for state in states] for kind in MOMENTS}
        if masters is not None:
            parts[MAIN] = list(masters[number])
        for kind, tensors in parts.items():
            placed = found.setdefault(kind, [{} for _ in chunks])
            for (i, key), stored in zip(names, tensors, strict=True):
                placed[i][key] = stored
    step = next(iter(inner["state"].values())).get("step", inner["param_groups"][0].get("step"))
    return RankState(found, step, inner["param_groups"])


def _decays(key: str, stored: Stored) -> bool:
    """Whether weight decay touches a parameter: not a bias, not of one dimension."""
    return not key.endswith(".bias") and len(stored.shape) > 1
