"""Reader of Megatron checkpoints for the reference model, one tensor per tensor-parallel rank.

Names are matched by patterns for all programs, layers are counted here, and no tensor is
concatenated. Shares with the converter only the functions that open files (:mod:`reference`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.files.torch_archive import load_archive

RankTensors = dict[str, list[Callable[[], torch.Tensor]]]
"""For each name, such as ``layers.3.qkv.weight``, functions that read each rank's tensor."""

_KINDS = {
    r"word_embeddings": "embedding",
    r"position_embeddings": "positions",
    r"output_layer|lm_head": "head",
    r"final_(layer)?norm|decoder\.final_layernorm": "final_norm",
    r"input_layernorm|linear_qkv\.layer_norm": "norm1",
    r"(pre_mlp|post_attention)_layernorm|linear_fc1\.layer_norm": "norm2",
    r"self_attention\.(linear_qkv|query_key_value)": "qkv",
    r"self_attention\.query": "query",
    r"self_attention\.key_value": "key_value",
    r"self_attention\.(linear_proj|dense)": "proj",
    r"self_attention\.q_(layer)?norm": "query_norm",
    r"self_attention\.k_(layer)?norm": "key_norm",
    r"mlp\.router": "router",
    r"mlp\.shared_experts\.linear_fc1": "shared_fc1",
    r"mlp\.shared_experts\.linear_fc2": "shared_fc2",
    r"mlp\.shared_experts\.gate": "shared_gate",
    r"mlp\.(linear_fc1|dense_h_to_4h)": "fc1",
    r"mlp\.(linear_fc2|dense_4h_to_h)": "fc2",
}


def open_rank_tensors(kind: str, folder: Path) -> tuple[RankTensors, Any]:
    """Open the tensors of a checkpoint, and the arguments of its run.

    Args:
        kind: ``megatron-lm`` or ``megatron-deepspeed``.
        folder: checkpoint of one iteration.
    """
    if kind == "megatron-deepspeed":
        return _open_deepspeed(folder)
    if (folder / torch_dist.METADATA).is_file():
        return _open_torch_dist(folder)
    return _open_legacy(folder)


def _match_name(key: str) -> tuple[str, int | None] | None:
    """Return the name of a key without the layer number, and the layer number."""
    match = re.search(r"layers\.(\d+)\.", key)
    expert = re.search(r"mlp\.experts(?:\.\w+)*?(?:\.(\d+))?\.linear_(fc[12])\.weight(\d*)$", key)
    if expert:
        number = expert[1] or expert[3]
        name = f"expert{number}.{expert[2]}.weight" if number else f"experts.{expert[2]}.weight"
        return name, int(match[1]) if match else None
    for pattern, kind in _KINDS.items():
        ending = re.search(rf"(^|\.)({pattern})[._](weight|bias|expert_bias)$", key)
        if ending:
            return f"{kind}.{ending[ending.re.groups]}", int(match[1]) if match else None
    return None


def _add_tensors(
    parts: RankTensors,
    rank: int,
    items: Iterable[tuple[str, Any]],
    offset: int,
    default_layer: int | None = None,
) -> int:
    """Add the tensors of one file of a rank; return the number of its layers.

    Args:
        parts: tensors found so far; modified.
        rank: tensor-parallel rank; a second tensor of a name and rank is a tied copy.
        items: keys and stored tensors.
        offset: number of the first layer of the file.
        default_layer: layer number for keys that do not contain one.
    """
    layers = set()
    for key, stored in items:
        found = _match_name(key)
        if found is None or not hasattr(stored, "read"):
            continue
        name, layer = found
        if name.partition(".")[0] not in ("embedding", "positions", "head", "final_norm"):
            layer = default_layer if layer is None else layer
            layers.add(layer)
            name = f"layers.{offset + (layer or 0)}.{name}"
        held = parts.setdefault(name, [])
        if len(held) == rank:
            held.append(stored.read)
    return len(layers)


def _open_legacy(folder: Path) -> tuple[RankTensors, Any]:
    parts: RankTensors = {}
    args = None
    files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"), key=_rank_numbers)
    ranks: dict[int, list[dict[str, Any]]] = {}
    for path in files:
        content = load_archive(path)
        args = args or content["args"]
        ranks.setdefault(_rank_numbers(path)[0], []).append(content)
    for rank, stages in sorted(ranks.items()):
        offset = 0
        chunks = [key for key in stages[0] if re.fullmatch(r"model\d*", key)]
        for chunk in sorted(chunks, key=lambda key: int(key[5:] or 0)):
            for stage in stages:
                offset += _add_tensors(parts, rank, _flatten(stage[chunk]), offset)
    if args is not None and not getattr(args, "untie_embeddings_and_output_weights", False):
        parts.pop("head.weight", None)
    return parts, args


def _rank_numbers(path: Path) -> tuple[int, ...]:
    """Return the tensor and pipeline rank in a folder's name."""
    return tuple(int(number) for number in re.findall(r"\d+", path.parent.name))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _open_deepspeed(folder: Path) -> tuple[RankTensors, Any]:
    parts: RankTensors = {}
    states = sorted(folder.glob("mp_rank_*_model_states.pt"))
    first = load_archive(states[0])
    if first.get("module") is not None:
        for rank, path in enumerate(states):
            _add_tensors(parts, rank, _flatten(load_archive(path)["module"]), 0)
        return parts, first["args"]
    files = [(_layer_file(path), path) for path in folder.glob("layer_*-model_*-model_states.pt")]
    numbers = sorted({number for (number, _), _ in files})
    layer = 0
    for number in numbers:
        found = 0
        for (of, rank), path in sorted(files):
            if of == number:
                content = load_archive(path)
                norm = {f"final_norm.{k}": v for k, v in content.items() if k in ("weight", "bias")}
                found = _add_tensors(parts, rank, (norm or content).items(), layer, default_layer=0)
        layer += found
    return parts, first["args"]


def _layer_file(path: Path) -> tuple[int, int]:
    number, rank = re.findall(r"\d+", path.name)[:2]
    return int(number), int(rank)


def _open_torch_dist(folder: Path) -> tuple[RankTensors, Any]:
    parts: RankTensors = {}
    for key, entry in torch_dist.read_metadata(folder).items():
        found = None if key.startswith("optimizer.") else _match_name(key)
        if found is None:
            continue
        name, layer = found
        if "layers." not in key:
            parts[name] = [partial(_read_chunks, entry, ())]
            continue
        stacked = layer is None
        for i in range(entry.shape[0]) if layer is None else [layer]:
            lead = (i,) if stacked else ()
            if not name.startswith("experts."):
                parts[f"layers.{i}.{name}"] = [partial(_read_chunks, entry, lead)]
                continue
            for e in range(entry.shape[len(lead)]):
                expert = name.replace("experts", f"expert{e}")
                parts[f"layers.{i}.{expert}"] = [partial(_read_chunks, entry, (*lead, e))]
    return parts, torch_dist.read_common_state(folder)["args"]


def _read_chunks(entry: torch_dist.TensorEntry, lead: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor from its chunks, or a part of ``[layers, ...]``, ``[layers, experts, ...]``.

    Each chunk of a stack is of one part: the converter refuses others.
    """
    first = len(lead)  # dimensions of the stack
    whole = torch.empty(entry.shape[first:], dtype=entry.dtype.torch)
    for (offsets, sizes), (path, offset, length) in entry.chunks.items():
        if offsets[:first] != lead:
            continue
        size = sizes[first:]
        box = tuple(slice(o, o + n) for o, n in zip(offsets[first:], size, strict=True))
        whole[box] = torch_dist.ChunkTensor(path, offset, length, size, entry.dtype).read()
    return whole
