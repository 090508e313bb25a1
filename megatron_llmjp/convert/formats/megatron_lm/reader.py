"""Reader of Megatron-LM checkpoints: legacy ``torch``, one file per rank, and ``torch_dist``.

Source: megatron/training/checkpointing.py (core 0.6 to 0.16). Legacy files are
``iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt`` with ``args``, ``iteration`` and ``model``, a
flat dictionary whose layers are numbered within the stage (``model0``, ``model1``, ... with
virtual stages); its optimizer states are numbered. ``torch_dist`` has the layout of
``mcore_names.py``, and args in ``common.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.checkpoint.extra_states import is_extra_state
from megatron_llmjp.checkpoint.manifest import folder_name
from megatron_llmjp.checkpoint.save_folder import MEGATRON_LM
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.files.storage import StoredTensor
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.megatron_lm.arguments import (
    model_from_args,
    notes_from_args,
    settings_from_args,
    tiktoken_of,
    tokenizer_type_of,
    vocabulary_notes,
)
from megatron_llmjp.convert.formats.megatron_lm.pipeline_arguments import (
    describe_saved_layout,
    describe_stages,
)
from megatron_llmjp.convert.formats.rank_files import RankTensors, canonical_name_in_layer
from megatron_llmjp.convert.model_tokenizer import tokenizer_files
from megatron_llmjp.convert.optimizer import optimizer_state
from megatron_llmjp.convert.optimizer.optimizer_state import MAIN_WEIGHTS, MOMENTS, OptimizerState
from megatron_llmjp.convert.tensors import EXPERT, FINAL_NORM, OUTPUT_LAYER, WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?$")
_OLD_ROOTS = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.": "decoder.",
    "language_model.transformer.": "decoder.",
    "language_model.output_layer.": "output_layer.",
}
_TIED_COPIES = ("word_embeddings_for_head.weight", "word_embeddings.weight")


class RankOptimizerState(NamedTuple):
    """The optimizer state of one rank's file, by model chunk and key of the weight."""

    chunks: dict[str, list[dict[str, StoredTensor]]]
    """By kind (moments, fp32 weights): one dictionary per model chunk, with the weights' keys."""
    step: Any
    groups: list[dict[str, Any]]


def rank_optimizer_state(
    content: dict[str, Any], chunks: list[dict[str, Any]], path: Path
) -> RankOptimizerState:
    """Assign the numbered optimizer states of a rank's file to the keys of the weights.

    megatron-core numbers parameters group by group: those with and those without weight decay, in
    an order that depends on the rank, and within a group in the order of the model
    (megatron/core/optimizer/__init__.py, ``_get_param_groups``).

    Raises:
        UserError: there is no state, it is stored in another file, or the numbers do not match.
    """
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, dict):
        raise UserError(f"{path}: no optimizer state; was it saved with --no-save-optim?")
    inner = optimizer.get("optimizer", optimizer)
    if not inner.get("state"):
        raise UserError(
            f"{path}: its optimizer state is in distrib_optim.pt, flattened into buckets; load "
            "it with Megatron-LM and save it with --ckpt-format torch_dist"
        )
    weights = [(i, key) for i, chunk in enumerate(chunks) for key in chunk]
    found: dict[str, list[dict[str, StoredTensor]]] = {}
    masters = optimizer.get("fp32_from_fp16_params")
    for number, group in enumerate(inner["param_groups"]):
        decays = bool(group.get("wd_mult", 1.0))
        names = [(i, key) for i, key in weights if _decays(key, chunks[i][key]) == decays]
        if len(names) != len(group["params"]):
            raise UserError(
                f"{path}: a parameter group has {len(group['params'])} states for {len(names)} "
                f"weights {'with' if decays else 'without'} weight decay"
            )
        states = [inner["state"][index] for index in group["params"]]
        parts = {kind: [state[kind] for state in states] for kind in MOMENTS}
        if masters is not None:
            parts[MAIN_WEIGHTS] = list(masters[number])
        for kind, tensors in parts.items():
            placed = found.setdefault(kind, [{} for _ in chunks])
            for (i, key), stored in zip(names, tensors, strict=True):
                placed[i][key] = stored
    step = next(iter(inner["state"].values())).get("step", inner["param_groups"][0].get("step"))
    return RankOptimizerState(found, step, inner["param_groups"])


def _decays(key: str, stored: StoredTensor) -> bool:
    """Return whether a parameter has weight decay: not a bias, more than one dimension."""
    return not key.endswith(".bias") and len(stored.shape) > 1


def read_megatron_lm(path: Path, ignored: Collection[str] = ()) -> SourceCheckpoint:
    """Open the folder of an iteration, or of a run with a tracker file.

    Args:
        path: the folder.
        ignored: names of arguments to ignore.

    Raises:
        UserError: it is incomplete, damaged, or not supported.
    """
    folder = newest_iteration(path)
    if (folder / torch_dist.METADATA).is_file():
        return _read_torch_dist(folder, ignored)
    return _read_legacy(folder, ignored)


def newest_iteration(path: Path) -> Path:
    """Return the folder of the iteration in ``path``: itself, the tracked or the last one."""
    if (path / torch_dist.METADATA).is_file() or next(path.glob(f"mp_rank_*/{FILE}"), None):
        return path
    tracker = path / TRACKER
    if tracker.is_file():
        with tracker.open("rb") as stream:
            text = stream.read(100).decode(errors="replace").strip()
        is_number = re.fullmatch(r"[0-9]{1,18}", text)
        name = text if text == "release" else folder_name(int(text)) if is_number else ""
        if name and (path / name).is_dir():
            return path / name
        raise UserError(f"{tracker}: '{text}' is not a checkpoint in {path}")
    folders = sorted(p for p in path.glob("iter_*") if p.is_dir())
    if not folders:
        raise UserError(f"{path}: no {TRACKER}, iter_* or mp_rank_* folders found")
    return folders[-1]


def _source(
    folder: Path,
    args: Any,
    iteration: Any,
    model: ModelConfig,
    reads: dict[str, Any],
    layout: str,
    optimizer: Callable[[], OptimizerState],
) -> SourceCheckpoint:
    notes = [*notes_from_args(args), *vocabulary_notes(model)]
    tokenizer = folder / "tokenizer"  # from core 0.20 on
    return SourceCheckpoint(
        MEGATRON_LM,
        folder,
        model,
        reads,
        layout,
        iteration=iteration if isinstance(iteration, int) else None,
        consumed_samples=getattr(args, "consumed_train_samples", None),
        tokenizer=tokenizer if tokenizer.is_dir() and tokenizer_files(tokenizer) else None,
        seq_length=getattr(args, "seq_length", None),
        notes=notes,
        settings=settings_from_args(args),
        tokenizer_type=tokenizer_type_of(args),
        tiktoken=tiktoken_of(args),
        optimizer=optimizer,
    )


def _read_torch_dist(folder: Path, ignored: Collection[str]) -> SourceCheckpoint:
    common = torch_dist.read_common_state(folder)
    stored = torch_dist.read_metadata(folder)
    entries = mcore_names.model_entries(stored)
    if "args" not in common:
        raise UserError(f"{folder / 'common.pt'}: no args found, which define the model")
    if WORD_EMBEDDINGS not in entries:
        raise UserError(f"{folder}: {WORD_EMBEDDINGS} is missing")
    model = model_from_args(common["args"], str(folder / "common.pt"), ignored)
    reads = mcore_names.tensor_reads(model, entries[WORD_EMBEDDINGS].shape[0], entries)
    optimizer = partial(optimizer_state.read_torch_dist_state, model, stored, common, folder)
    args, iteration = common["args"], common.get("iteration")
    layout = f"torch_dist{describe_saved_layout(args, model.num_layers)}"
    return _source(folder, args, iteration, model, reads, layout, optimizer)


def _read_legacy(folder: Path, ignored: Collection[str]) -> SourceCheckpoint:
    ranks = _rank_files(folder)
    tensor = 1 + max(t for t, _ in ranks)
    pipeline = 1 + max(p for _, p in ranks)
    if len(ranks) != tensor * pipeline:
        raise UserError(f"{folder}: {len(ranks)} ranks found, {tensor} x {pipeline} expected")
    gathered = RankTensors()
    args: Any = None
    iteration = None
    for t in range(tensor):
        stages = []
        for p in range(pipeline):
            content = load_archive(ranks[t, p])
            args = args or content.get("args")
            iteration = content.get("iteration", iteration)
            if (version := content.get("checkpoint_version", 0)) < 2.0:
                raise UserError(
                    f"{ranks[t, p]}: checkpoint_version {version} has a different order of "
                    "QKV rows; load and save it with a newer Megatron-LM"
                )
            stages.append(_chunks(content, ranks[t, p]))
        model = model_from_args(args, str(folder), ignored)
        _check_expert_ranks(args, model, folder, tensor)
        for name, stored in _numbered(stages, model.untie_embeddings_and_output_weights):
            gathered.add(name, t, stored)
    reads = gathered.reads(folder, model, tensor)
    counts = [[_layer_count(chunk) for chunk in stage] for stage in stages]
    layout = f"torch, TP {tensor} x PP {pipeline}{describe_stages(counts)}"
    optimizer = partial(_legacy_optimizer, folder, model, ranks, tensor, pipeline)
    return _source(folder, args, iteration, model, reads, layout, optimizer)


def _legacy_optimizer(
    folder: Path, model: ModelConfig, ranks: dict[tuple[int, int], Path], tensor: int, pipeline: int
) -> OptimizerState:
    """Read the optimizer state like the weights: renumber layers, join tensor-parallel ranks."""
    kinds: dict[str, RankTensors] = {}
    for t in range(tensor):
        stages = []
        for p in range(pipeline):
            content = load_archive(ranks[t, p])
            chunks = _chunks(content, ranks[t, p])
            stages.append(rank_optimizer_state(content, chunks, ranks[t, p]))
        for kind in stages[0].chunks:
            moments = [stage.chunks[kind] for stage in stages]
            for name, stored in _numbered(moments, model.untie_embeddings_and_output_weights):
                kinds.setdefault(kind, RankTensors()).add(name, t, stored)
    tensors = {kind: gathered.reads(folder, model, tensor) for kind, gathered in kinds.items()}
    last = stages[-1]
    return optimizer_state.make_optimizer_state(tensors, last.step, last.groups, content, folder)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in folder.glob("mp_rank_*"):
        match = _RANK.match(path.name)
        if match is None:
            raise UserError(f"{path}: expert parallel checkpoints cannot be converted")
        if not (path / FILE).is_file():
            raise UserError(f"{path / FILE}: missing")
        found[int(match[1]), int(match[2] or 0)] = path / FILE
    if not found:
        raise UserError(f"{folder}: no mp_rank_* folders found")
    return found


def _check_expert_ranks(args: Any, model: ModelConfig, folder: Path, tensor: int) -> None:
    """Refuse experts that are divided over other ranks than the dense layers."""
    if not model.has_experts:
        return
    ranks = getattr(args, "expert_model_parallel_size", None) or 1
    size = getattr(args, "expert_tensor_parallel_size", None) or tensor
    if ranks > 1 or size != tensor:
        raise UserError(
            f"{folder}: --ckpt-format torch with expert_model_parallel_size {ranks} and "
            f"expert_tensor_parallel_size {size} cannot be converted; load it with Megatron-LM and "
            "save it with --ckpt-format torch_dist"
        )


def _chunks(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the flattened model chunks of a rank: one, or one per virtual stage."""
    names = (
        ["model"]
        if "model" in content
        else sorted((k for k in content if re.fullmatch(r"model\d+", k)), key=lambda k: int(k[5:]))
    )
    if not names:
        raise UserError(f"{path}: no model found")
    return [_flat(content[name]) for name in names]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten the nested state of an older model, joining names by dots; skip extra states."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if is_extra_state(key):
            continue
        if isinstance(item, dict):
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _layer_count(chunk: dict[str, Any]) -> int:
    """Return the number of layers of a model chunk."""
    found = (re.match(r"decoder\.layers\.(\d+)\.", _current(key)) for key in chunk)
    return len({match[1] for match in found if match})


def _numbered(stages: list[list[dict[str, Any]]], untied: bool) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of one tensor-parallel rank with global layer numbers.

    Chunks are ordered by virtual stage, then by stage; a stage may have any number of layers.
    """
    offset = 0
    for virtual in range(len(stages[0])):
        for stage in stages:
            for key, stored in stage[virtual].items():
                name = _current(key)
                match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
                if match:
                    name = f"decoder.layers.{offset + int(match[1])}.{_inner(match[2])}"
                elif not untied and (name == OUTPUT_LAYER or name.startswith(_TIED_COPIES)):
                    continue
                yield name, stored
            offset += _layer_count(stage[virtual])


def _current(key: str) -> str:
    """Return a key with canonical module names above the layers; it may predate megatron-core."""
    key = key.removeprefix("module.")
    for old, new in _OLD_ROOTS.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
    return key.replace("decoder.final_layernorm", FINAL_NORM)


def _inner(name: str) -> str:
    """Return the canonical name relative to a layer, from fused norms or old names."""
    for local, fused in mcore_names.FUSED_NORMS.items():
        name = name.replace(fused, local)
    grouped = re.fullmatch(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)", name)
    if grouped:  # of TEGroupedMLP
        return f"{EXPERT.format(e=grouped[2])}{grouped[1]}.weight"
    return canonical_name_in_layer(name)
