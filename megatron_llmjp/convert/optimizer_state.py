"""Optimizer state of ``fully_sharded_model_space``: flat pieces of fragments.

The format of megatron-core's distributed optimizer in LLM-jp's fork (core 0.12): a tensor is cut
into a grid of fragments, as tensor parallelism cuts it, each fragment is flattened, and each
data-parallel rank stores a piece of it. On disk the entry has the shape ``[grid..., elements of a
fragment]``; stacked layers are the first axis of the grid
(megatron/core/dist_checkpointing/strategies/torch.py).

AdamW's state in checkpoints: both moments and the fp32 weights, as canonical tensors.

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
from megatron_llmjp.convert.files.checksums import Region
from megatron_llmjp.convert.files.storage import byte_count, placed
from megatron_llmjp.convert.files.torch_dist import ChunkTensor, StoredEntry, Writer
from megatron_llmjp.convert.formats.mcore_names import on_disk, reads
from megatron_llmjp.convert.formats.registry import Options, Source, account
from megatron_llmjp.convert.plan import Read, Write
from megatron_llmjp.convert.tensors import VOCABULARY, WORD_EMBEDDINGS, Shape, boxes, shapes
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Fragment:
    """A rectangular part of a tensor, stored as flat pieces."""

    pieces: tuple[tuple[int, ChunkTensor], ...]
    """Number of the first element, and where the elements from there on are."""
    shape: Shape
    dtype: torch.dtype

    @property
    def source(self) -> str:
        """The file of the first piece."""
        return self.pieces[0][1].source

    @property
    def regions(self) -> tuple[Region, ...]:
        """The checksums that reading it takes part in."""
        return tuple(region for _, chunk in self.pieces for region in chunk.regions)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read it, into fresh memory or a contiguous tensor of as many elements.

        Raises:
            UserError: a file is damaged.
        """
        flat = torch.empty(byte_count(self.shape, torch.uint8), dtype=self.dtype)
        for start, chunk in self.pieces:
            flat[start : start + byte_count(chunk.shape, torch.uint8)] = chunk.read().flatten()
        return placed(flat.view(self.shape), into)


def unflattened(model: ModelConfig, entries: dict[str, StoredEntry]) -> dict[str, Read]:
    """How to read every canonical tensor of one kind of state.

    Raises:
        UserError: a tensor is missing, or its pieces do not cover it.
    """
    rows = byte_count(entries[WORD_EMBEDDINGS].shape, torch.uint8) // model.hidden_size
    found = {}
    for name, shape in shapes(model, rows).items():
        key, layer = on_disk(name)
        entry = entries.get(key) or entries.get(name)
        if entry is not None:
            found[name] = _read(name, entry, shape, layer if key in entries else None)
    return found


def _read(name: str, entry: StoredEntry, shape: Shape, layer: int | None) -> Read:
    stacked = layer is not None
    grid = entry.shape[stacked:-1]
    where = next(iter(entry.chunks.values()))[0].parent
    if len(grid) != len(shape) or any(n % g for n, g in zip(shape, grid, strict=True)):
        raise UserError(f"{where}: {name} {shape} was cut into fragments {grid}, which do not fit")
    sizes = tuple(n // g for n, g in zip(shape, grid, strict=True))
    pieces: dict[Shape, list[tuple[int, ChunkTensor]]] = {}
    for (offsets, lengths), place in entry.chunks.items():
        if stacked and offsets[0] != layer:
            continue
        if any(length != 1 for length in lengths[:-1]):
            raise UserError(f"{where}: a piece of {name} spans fragments")
        cell = tuple(i * n for i, n in zip(offsets[stacked:-1], sizes, strict=True))
        chunk = ChunkTensor(*place, lengths[-1:], entry.dtype, entry.files.get(place[0]))
        pieces.setdefault(cell, []).append((offsets[-1], chunk))
    covered = sum(chunk.shape[0] for cell in pieces.values() for _, chunk in cell)
    if covered != byte_count(shape, torch.uint8):
        raise UserError(f"{where}: the pieces of {name} {shape} do not cover it")
    parts = [Fragment(tuple(cell), sizes, entry.dtype) for cell in pieces.values()]
    return Read(shape, entry.dtype, parts, partial(boxes, places=[(c, sizes) for c in pieces]))


MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"
"""The fp32 weights that updates are added to, where the model's own are of another type."""

PREFIX = "optimizer.state."
"""Of its tensors' names in a conversion and in distributed checkpoints, before the kind."""

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


def opened(source: Source, options: Options) -> Source:
    """A checkpoint whose optimizer's state is open, and fits what is to be written.

    Weights that are to be fp32 are the main ones.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    state = of_source(source)
    tensors = dict(state.tensors)
    scaler = state.grad_scaler
    if (options.dtype or source.dtype) == torch.float32 and MAIN in tensors:
        source = replace(source, reads=tensors.pop(MAIN)).check()
    if (options.dtype or source.dtype) != torch.float16:
        scaler = None
    state = replace(state, tensors=tensors, grad_scaler=scaler)
    return replace(source, optimizer=lambda: state)


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
            found[f"{PREFIX}{kind}.{name}"] = read
    return found


def prefixes(source: Source, options: Options) -> dict[str, str]:
    """For each kind, what stands before a weight's name in the name of the tensor that fills it.

    Weights stand for the main ones where there are no others; without a state there is no more.
    """
    if source.optimizer is None:
        return {MAIN: ""}
    kinds = _kinds(source, of_source(source), options)
    return {MAIN: "", **{kind: f"{PREFIX}{kind}." for kind in kinds}}


def parameter(name: str) -> str:
    """The weight that a tensor of a conversion belongs to, or is."""
    return name.removeprefix(PREFIX).partition(".")[2] if name.startswith(PREFIX) else name


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
            placed = writer.add_tensor(f"{PREFIX}{kind}.{stored}", shape, torch.float32, layer)
            layout = partial(boxes, places=tuple(box for box, _ in placed))
            vocabulary = rows if name in VOCABULARY else None
            writes[f"{PREFIX}{kind}.{name}"] = Write(
                layout, [[slot] for _, slot in placed], vocabulary
            )
    for stored in dict.fromkeys(stored for stored, _ in keys.values()):
        main = f"{PREFIX}{MAIN}.{stored}"
        if MAIN not in kinds:
            writer.add_alias(main, stored)
        writer.add_alias(f"{PREFIX}{_MAIN_OF_PLAIN}.{stored}", main)
    return writes


def common(state: OptimizerState) -> dict[str, Any]:
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
        prefix = f"{PREFIX}{stored_kind}."
        own = {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}
        if own and kind not in tensors:
            tensors[kind] = _reads(model, own)
    optimizer = common_state.get("optimizer")
    if not tensors or not isinstance(optimizer, dict):
        raise UserError(f"{where}: holds no optimizer state: saved with --no-save-optim?")
    inner = optimizer if "param_groups" in optimizer else optimizer["optimizer"]
    step = inner.get("state", {}).get("common_step", inner["param_groups"][0].get("step"))
    return make_state(tensors, step, inner["param_groups"], common_state, where)


def _reads(model: ModelConfig, entries: dict[str, StoredEntry]) -> dict[str, Read]:
    """How to read one kind of state, whole or cut into flat pieces of fragments."""
    embedding = entries[WORD_EMBEDDINGS].shape
    if len(embedding) == 2:
        return reads(model, embedding[0], entries)
    return unflattened(model, entries)


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
    optimizer = content.get("optimizer")
    scaler = optimizer.get("grad_scaler") if isinstance(optimizer, dict) else None
    if scaler is not None:
        scaler = {**scaler, "scale": float(plain_number(scaler["scale"]))}
    return OptimizerState(tensors, int(plain_number(step)), plain, dict(scheduler), scaler)


def plain_number(value: Any) -> Any:
    """A number that a file may hold as a tensor."""
    return value.read().item() if hasattr(value, "read") else value
