"""Megatron-DeepSpeed's checkpoints: pipeline layer files, or the whole module in rank files.

Source: deepspeed/runtime/pipe/module.py and engine.py, megatron/model/gpt_model.py of LLM-jp's
fork. ``global_step<N>/layer_LL-model_TT-model_states.pt`` holds a flat dictionary per layer and
tensor-parallel rank, ``mp_rank_*`` the arguments; without pipeline, ``module`` of ``mp_rank_TT``
holds everything. Layer files are told apart by their keys: their numbers differ between versions.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert import zero
from megatron_llmjp.convert.formats import Source
from megatron_llmjp.convert.megatron_args import model_from_args
from megatron_llmjp.convert.megatron_ranks import (
    Gathered,
    new_name,
)
from megatron_llmjp.convert.plan import Read
from megatron_llmjp.convert.storage import Stored
from megatron_llmjp.convert.tensors import (
    FINAL_NORM,
    LAYER,
    OUTPUT_LAYER,
    POSITION_EMBEDDINGS,
    WORD_EMBEDDINGS,
    Part,
    shapes,
)
from megatron_llmjp.convert.torch_archive import load
from megatron_llmjp.errors import UserError

LATEST = "latest"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")


_MODULES = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.final_layernorm": FINAL_NORM,
    "language_model.encoder.": "",
    "language_model.output_layer": "output_layer",
}


def read(path: Path, main_weights: bool = False) -> Source:
    """Open a ``global_step*`` folder, or the one that ``latest`` names.

    Args:
        path: the folder.
        main_weights: take the fp32 weights of the ZeRO optimizer instead of the model's.

    Raises:
        UserError: it is incomplete, damaged, or cannot be represented.
    """
    folder = newest(path)
    first, ranks = _rank_files(folder)
    content = load(first)
    if "args" not in content:
        raise UserError(f"{first}: holds no args: not of Megatron-DeepSpeed")
    args = content["args"]
    if content.get("checkpoint_version", 0) < 2.0:
        raise UserError(
            f"{first}: checkpoint_version {content.get('checkpoint_version', 0)} has another order "
            "of QKV rows; load and save it with a newer Megatron-DeepSpeed"
        )
    model = model_from_args(args, str(first))
    known = content.get("universal_checkpoint_info") or {}
    if isinstance(known.get("original_vocab_size"), int):
        model = model.model_copy(update={"vocab_size": known["original_vocab_size"]})
    gathered = Gathered()
    if content.get("module") is None:
        tensor = _gather_layers(folder, model, gathered)
        layout = f"pipeline layers, TP {tensor} x PP {max(1, len(ranks) // tensor)}"
    else:
        tensor = len(ranks)
        _gather_modules(ranks, gathered)
        layout = f"no pipeline, TP {tensor}"
    if getattr(args, "sequence_parallel", False) and POSITION_EMBEDDINGS in gathered.parts:
        raise UserError(f"{folder}: position embeddings split by sequence parallelism")
    if main_weights:
        gathered = _gather_main_weights(folder, model, ranks, tensor)
        layout += ", fp32 weights of the optimizer"
    reads = _join_separate_keys(folder, gathered, model, tensor)
    reads |= gathered.reads(folder, model, tensor)
    notes = []
    if model.vocab_size is None:
        notes.append(
            "the true vocabulary size is not in the checkpoint: its padding was kept; "
            "--vocab-size N trims it"
        )
    return Source(
        "megatron-deepspeed",
        folder,
        model,
        reads,
        layout,
        iteration=content.get("iteration"),
        consumed_samples=getattr(args, "consumed_train_samples", None),
        seq_length=getattr(args, "seq_length", None),
        notes=notes,
    )


def newest(path: Path) -> Path:
    """The ``global_step*`` folder that ``path`` means."""
    if next(path.glob("mp_rank_*_model_states.pt"), None):
        return path
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if not tag or "/" in tag or not (path / tag).is_dir():
            raise UserError(f"{latest}: names '{tag}', which is not in {path}")
        return path / tag
    steps = [
        (int(m[1]), p)
        for p in path.glob("global_step*")
        if (m := re.fullmatch(r"global_step(\d+)", p.name))
    ]
    if not steps:
        raise UserError(f"{path}: holds neither {LATEST} nor global_step* nor mp_rank_* files")
    return max(steps)[1]


def _rank_files(folder: Path) -> tuple[Path, dict[int, Path]]:
    found = {int(m[1]): p for p in folder.iterdir() if (m := _RANK_FILE.match(p.name))}
    if 0 not in found:
        raise UserError(f"{folder}: mp_rank_00_model_states.pt is missing")
    if sorted(found) != list(range(len(found))):
        raise UserError(f"{folder}: of mp_rank_* files only {sorted(found)} are there")
    return found[0], found


def _gather_layers(folder: Path, model: ModelConfig, gathered: Gathered) -> int:
    """Take up the layer files; returns the tensor parallel size."""
    files: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := _LAYER_FILE.match(path.name):
            files.setdefault(int(match[1]), {})[int(match[2])] = path
    if not files:
        raise UserError(f"{folder}: holds no layer_*-model_* files")
    tensor = 1 + max(rank for ranks in files.values() for rank in ranks)
    layer = 0
    for _, ranks in sorted(files.items()):
        prefix = ""
        for rank, path in sorted(ranks.items()):
            for key, stored in load(path).items():
                name, prefix = _classify(key, stored, layer)
                if (
                    name == WORD_EMBEDDINGS
                    and name in gathered.parts
                    and (
                        rank in gathered.parts[name]
                        and not model.untie_embeddings_and_output_weights
                    )
                ):
                    continue  # a tied copy at the end
                gathered.add(name, rank, stored)
        layer += prefix != ""
    return tensor


def _classify(key: str, stored: Stored, layer: int) -> tuple[str, str]:
    """Canonical name of a key of a layer file, and the layer's prefix if it is of a layer."""
    if key in ("word_embeddings.weight", "position_embeddings.weight"):
        return f"embedding.{key}", ""
    if key == "lm_head.weight":
        return OUTPUT_LAYER, ""
    if key in ("weight", "bias"):
        return f"{FINAL_NORM}.{key}", ""
    if key.endswith("local_embeddings.weight"):
        raise UserError(f"{stored.source}: position embeddings split by sequence parallelism")
    prefix = LAYER.format(i=layer)
    return prefix + new_name(key), prefix


def _gather_modules(ranks: dict[int, Path], gathered: Gathered) -> None:
    """Take up the modules of a checkpoint without pipeline."""
    for rank, path in ranks.items():
        language = load(path)["module"].get("language_model", {})
        embedding, encoder = language.get("embedding", {}), language.get("encoder", {})
        for name in ("word_embeddings", "position_embeddings"):
            if name in embedding:
                gathered.add(f"embedding.{name}.weight", rank, embedding[name]["weight"])
        for key, stored in encoder.items():
            match = re.match(r"layers\.(\d+)\.(.*)", key)
            name = LAYER.format(i=match[1]) + new_name(match[2]) if match else f"decoder.{key}"
            gathered.add(name, rank, stored)
        if "output_layer" in language:
            gathered.add(OUTPUT_LAYER, rank, language["output_layer"]["weight"])


def _gather_main_weights(
    folder: Path, model: ModelConfig, ranks: dict[int, Path], tensor: int
) -> Gathered:
    """Take up the fp32 weights of every rank; of tied embeddings those of the first stage.

    The last stage's copy of the position embeddings is never kept in step with the first's.
    """
    numbers = sorted({int(m[1]) for p in folder.iterdir() if (m := _LAYER_FILE.match(p.name))})
    gathered = Gathered()
    for rank, path in ranks.items():
        for name, stored in zero.main_weights(folder, rank, load(path).get("param_shapes")):
            if name.startswith("tied_modules.embed.") and rank >= tensor:
                continue
            gathered.add(_parameter_name(name, stored, numbers), rank % tensor, stored)
    return gathered


def _parameter_name(name: str, stored: Stored, numbers: list[int]) -> str:
    """The canonical name of one of DeepSpeed's parameter names.

    Args:
        name: such as ``4.mlp.dense_4h_to_h.weight``; 4 is the number of a layer file.
        stored: for messages.
        numbers: of the layer files; the first is the embedding's.
    """
    for root in ("tied_modules.embed.", f"{numbers[0] if numbers else 1}."):
        if name.startswith(root):
            return _classify(name.removeprefix(root), stored, 0)[0]
    if match := re.match(r"(\d+)\.(.*)", name):
        number = int(match[1])
        layer = numbers.index(number) - 1 if number in numbers else 0
        return _classify(match[2], stored, layer)[0]
    name = name.removeprefix("module.")
    for old, new in _MODULES.items():
        name = name.replace(old, new)
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    return LAYER.format(i=match[1]) + new_name(match[2]) if match else name


def _join_separate_keys(
    folder: Path, gathered: Gathered, model: ModelConfig, tensor: int
) -> dict[str, Read]:
    """Grouped-query attention before November 2023 kept ``query`` and ``key_value`` apart."""
    reads = {}
    shape_of = shapes(model, 1)
    for i in range(model.num_layers):
        for kind in ("weight", "bias"):
            prefix = f"{LAYER.format(i=i)}self_attention."
            query = gathered.parts.pop(f"{prefix}query.{kind}", None)
            pair = gathered.parts.pop(f"{prefix}key_value.{kind}", None)
            if query is None or pair is None:
                continue
            name = f"{prefix}linear_qkv.{kind}"
            if name not in shape_of or len(query) != tensor or len(pair) != tensor:
                raise UserError(f"{folder}: query and key_value of layer {i} do not fit")
            layout = partial(
                query_and_key_value, groups=model.query_groups, head_dim=model.head_dim, size=tensor
            )
            parts = [ranks[t] for t in range(tensor) for ranks in (query, pair)]
            reads[name] = Read(shape_of[name], query[0].dtype, parts, layout)
    return reads


def query_and_key_value(tensor: torch.Tensor, groups: int, head_dim: int, size: int) -> list[Part]:
    """Grouped ``linear_qkv`` rows as ``query`` and ``key_value`` of each tensor-parallel rank."""
    rest = tuple(tensor.shape[1:])
    grouped = tensor.view(size, groups // size, -1, head_dim, *rest)
    parts = []
    for rank in range(size):
        for view in (grouped[rank, :, :-2], grouped[rank, :, -2:]):
            count = view.shape[0] * view.shape[1] * head_dim
            parts.append(Part(view, (count, *rest)))
    return parts
