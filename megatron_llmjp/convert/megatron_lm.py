"""Megatron-LM's checkpoints: the legacy ``torch`` format, one file per rank, and ``torch_dist``.

Source: megatron/training/checkpointing.py (core 0.6 to 0.16). Legacy files are
``iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt`` with ``args``, ``iteration`` and ``model``, a
flat dictionary whose layers are numbered within the stage (``model0``, ``model1``, ... with
virtual stages). ``torch_dist`` has the layout of :mod:`mcore_names`, and args in ``common.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import folder_name, write_durably
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert import dcp, mcore_names, optimizer_ranks, optimizer_state
from megatron_llmjp.convert.formats import Options, Source
from megatron_llmjp.convert.megatron_args import make_args, model_from_args, settings_from_args
from megatron_llmjp.convert.megatron_ranks import (
    Gathered,
    check_divides,
    new_name,
    rank_shape,
    target_rows,
    write_of,
)
from megatron_llmjp.convert.optimizer_state import OptimizerState
from megatron_llmjp.convert.plan import Checksums, Output, Slot
from megatron_llmjp.convert.tensors import FINAL_NORM, OUTPUT_LAYER, WORD_EMBEDDINGS, shapes
from megatron_llmjp.convert.torch_archive import load
from megatron_llmjp.convert.torch_archive_writer import Placeholder, plan_archive
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


def read(path: Path) -> Source:
    """Open an iteration's folder, or that of a run, whose tracker names the iteration.

    Raises:
        UserError: it is incomplete, damaged, or cannot be represented.
    """
    folder = newest(path)
    if (folder / dcp.METADATA).is_file():
        return _read_torch_dist(folder)
    return _read_legacy(folder)


def newest(path: Path) -> Path:
    """The iteration's folder that ``path`` means."""
    if (path / dcp.METADATA).is_file() or next(path.glob(f"mp_rank_*/{FILE}"), None):
        return path
    tracker = path / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        name = text if text == "release" else folder_name(int(text)) if text.isdigit() else ""
        if name and (path / name).is_dir():
            return path / name
        raise UserError(f"{tracker}: names '{text}', which is not in {path}")
    folders = sorted(p for p in path.glob("iter_*") if p.is_dir())
    if not folders:
        raise UserError(f"{path}: holds neither {TRACKER} nor iter_* nor mp_rank_* folders")
    return folders[-1]


def _source(
    folder: Path,
    args: Any,
    iteration: Any,
    reads: dict[str, Any],
    layout: str,
    optimizer: Callable[[], OptimizerState],
) -> Source:
    model = model_from_args(args, str(folder))
    notes = []
    if model.vocab_size is None:
        notes.append(
            "the true vocabulary size is not in the checkpoint: its padding was kept; "
            "--vocab-size N trims it"
        )
    return Source(
        "megatron-lm",
        folder,
        model,
        reads,
        layout,
        iteration=iteration if isinstance(iteration, int) else None,
        consumed_samples=getattr(args, "consumed_train_samples", None),
        seq_length=getattr(args, "seq_length", None),
        notes=notes,
        settings=settings_from_args(args),
        optimizer=optimizer,
    )


def _read_torch_dist(folder: Path) -> Source:
    common = load(folder / "common.pt")
    stored = dcp.read_metadata(folder)
    entries = mcore_names.weights(stored)
    if "args" not in common:
        raise UserError(f"{folder / 'common.pt'}: holds no args, so the model is not known")
    if WORD_EMBEDDINGS not in entries:
        raise UserError(f"{folder}: holds no {WORD_EMBEDDINGS}")
    model = model_from_args(common["args"], str(folder / "common.pt"))
    reads = mcore_names.reads(model, entries[WORD_EMBEDDINGS].shape[0], entries)
    optimizer = partial(optimizer_state.from_torch_dist, model, stored, common, folder)
    iteration = common.get("iteration")
    return _source(folder, common["args"], iteration, reads, "torch_dist", optimizer)


def _read_legacy(folder: Path) -> Source:
    ranks = _rank_files(folder)
    tensor = 1 + max(t for t, _ in ranks)
    pipeline = 1 + max(p for _, p in ranks)
    if len(ranks) != tensor * pipeline:
        raise UserError(f"{folder}: {len(ranks)} ranks found, {tensor} x {pipeline} expected")
    gathered = Gathered()
    args: Any = None
    iteration = None
    for t in range(tensor):
        stages = []
        for p in range(pipeline):
            content = load(ranks[t, p])
            args = args or content.get("args")
            iteration = content.get("iteration", iteration)
            if (version := content.get("checkpoint_version", 0)) < 2.0:
                raise UserError(
                    f"{ranks[t, p]}: checkpoint_version {version} has another order of "
                    "QKV rows; load and save it with a newer Megatron-LM"
                )
            stages.append(_chunks(content, ranks[t, p]))
        model = model_from_args(args, str(folder))
        for name, stored in _numbered(stages, model.untie_embeddings_and_output_weights):
            gathered.add(name, t, stored)
    reads = gathered.reads(folder, model, tensor)
    layout = f"torch, TP {tensor} x PP {pipeline}"
    optimizer = partial(_legacy_optimizer, folder, model, ranks, tensor, pipeline)
    return _source(folder, args, iteration, reads, layout, optimizer)


def _legacy_optimizer(
    folder: Path, model: ModelConfig, ranks: dict[tuple[int, int], Path], tensor: int, pipeline: int
) -> OptimizerState:
    """The optimizer's tensors go the way of the weights: numbered by layer, joined over TP."""
    kinds: dict[str, Gathered] = {}
    for t in range(tensor):
        stages = []
        for p in range(pipeline):
            content = load(ranks[t, p])
            chunks = _chunks(content, ranks[t, p])
            stages.append(optimizer_ranks.of_rank(content, chunks, ranks[t, p]))
        for kind in stages[0].chunks:
            moments = [stage.chunks[kind] for stage in stages]
            for name, stored in _numbered(moments, model.untie_embeddings_and_output_weights):
                kinds.setdefault(kind, Gathered()).add(name, t, stored)
    tensors = {kind: gathered.reads(folder, model, tensor) for kind, gathered in kinds.items()}
    last = stages[-1]
    return optimizer_state.make_state(tensors, last.step, last.groups, content, folder)


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
        raise UserError(f"{folder}: holds no mp_rank_* folders")
    return found


def _chunks(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The model chunks of a rank, flat: one, or one for each virtual stage."""
    names = (
        ["model"]
        if "model" in content
        else sorted((k for k in content if re.fullmatch(r"model\d+", k)), key=lambda k: int(k[5:]))
    )
    if not names:
        raise UserError(f"{path}: holds no model")
    return [_flat(content[name]) for name in names]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names of an older, nested model joined by dots; extra states left out."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key.endswith("_extra_state"):
            continue
        if isinstance(item, dict):
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _numbered(stages: list[list[dict[str, Any]]], untied: bool) -> Iterator[tuple[str, Any]]:
    """The tensors of one tensor-parallel rank with global layer numbers.

    Chunks follow each other by virtual stage, then by stage; a stage may hold any number of
    layers.
    """
    offset = 0
    for virtual in range(len(stages[0])):
        for stage in stages:
            layers = set()
            for key, stored in stage[virtual].items():
                name = _current(key)
                match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
                if match:
                    layers.add(int(match[1]))
                    name = f"decoder.layers.{offset + int(match[1])}.{_inner(match[2])}"
                elif not untied and (name == OUTPUT_LAYER or name.startswith(_TIED_COPIES)):
                    continue
                yield name, stored
            offset += len(layers)


def _current(key: str) -> str:
    """The canonical root of a key that may come from before megatron-core."""
    key = key.removeprefix("module.")
    for old, new in _OLD_ROOTS.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
    return key.replace("decoder.final_layernorm", FINAL_NORM)


def _inner(name: str) -> str:
    """The canonical name inside a layer: fused norms and old names undone."""
    for local, fused in mcore_names.FUSED.items():
        name = name.replace(fused, local)
    return new_name(name)


def plan(source: Source, options: Options) -> Output:
    """Lay out a checkpoint that Megatron-LM loads with ``--load OUT --finetune``.

    Raises:
        UserError: it has no way to express the model.
    """
    if source.model.use_parallel_residual:
        raise UserError(f"{source.path}: Megatron-LM has no layer with a parallel residual")
    if options.megatron_format == "torch_dist":
        return _plan_torch_dist(source, options)
    return _plan_legacy(source, options)


def _args(source: Source, options: Options, rows: int) -> Any:
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
    if model.vocab_size is not None:
        extra["vocab_size"] = model.vocab_size
    dtype = options.dtype or source.dtype
    sizes = options.tensor_parallel, options.pipeline_parallel
    return make_args(model, rows, dtype, *sizes, extra)


def _plan_torch_dist(source: Source, options: Options) -> Output:
    rows = target_rows(source.model, source.rows, options.tensor_parallel)
    iteration = source.iteration or 0
    folder = _folder(iteration)
    writer = dcp.Writer(options.max_shard_size, folder)
    writes = mcore_names.add_model(writer, source, options, rows)
    common = {
        "args": _args(source, options, rows),
        "checkpoint_version": 3.0,
        "iteration": iteration,
    }

    def finish(out: Path, _: Checksums) -> None:
        writer.finish(out / folder, common)
        _write_tracker(out, iteration)

    return Output(writer.files, writes, finish)


def _folder(iteration: int) -> str:
    """Megatron-LM refuses iteration 0 through its tracker; a converted model is a release."""
    return folder_name(iteration) if iteration else "release"


def _write_tracker(out: Path, iteration: int) -> None:
    write_durably(out / TRACKER, str(iteration) if iteration else "release")


def _plan_legacy(source: Source, options: Options) -> Output:
    model, tensor, pipeline = source.model, options.tensor_parallel, options.pipeline_parallel
    check_divides(model, tensor, pipeline)
    rows = target_rows(model, source.rows, tensor)
    iteration = source.iteration or 0
    local = {
        name: _placed(name, model.num_layers // pipeline, pipeline, options)
        for name in shapes(model, rows)
    }
    if not model.untie_embeddings_and_output_weights and pipeline > 1:
        local[WORD_EMBEDDINGS].append((pipeline - 1, OUTPUT_LAYER))
    files = []
    slots: dict[str, dict[int, list[Slot]]] = {name: {} for name in local}
    for t in range(tensor):
        for p in range(pipeline):
            tree: dict[str, Any] = {}
            for name, shape in shapes(model, rows).items():
                held = rank_shape(name, model, shape, tensor)
                dtype = options.dtype_of(source.reads[name])
                tree |= {
                    key: Placeholder(key, held, dtype) for stage, key in local[name] if stage == p
                }
            content = {
                "args": _args(source, options, rows),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "model": _with_extra_states(tree),
            }
            rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "")
            file = plan_archive(f"{_folder(iteration)}/{rank}/{FILE}", content)
            files.append(file)
            for name, places in local.items():
                slots[name].setdefault(t, []).extend(
                    file.slots[key] for stage, key in places if stage == p
                )
    writes = {name: write_of(name, model, tensor, slots[name], rows) for name in local}
    return Output(files, writes, lambda out, _: _write_tracker(out, iteration))


def _placed(name: str, per_stage: int, pipeline: int, options: Options) -> list[tuple[int, str]]:
    """The stages that hold a tensor, with its key there."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        stage, layer = divmod(int(match[1]), per_stage)
        inner = match[2]
        if options.transformer_impl == "transformer_engine":
            for plain, fused in mcore_names.FUSED.items():
                inner = inner.replace(plain, fused)
        return [(stage, f"decoder.layers.{layer}.{inner}")]
    return [(0 if name.startswith("embedding.") else pipeline - 1, name)]


def _with_extra_states(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the ``_extra_state`` that megatron-core keeps beside every linear layer."""
    found: dict[str, Any] = {}
    for key, placeholder in tree.items():
        found[key] = placeholder
        if ".linear_" in key and key.endswith(".weight"):
            found[key.removesuffix("weight") + "_extra_state"] = None
    return found
