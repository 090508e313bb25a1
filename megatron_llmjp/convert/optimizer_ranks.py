"""The numbered optimizer states of Megatron-LM's legacy files, under the names of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.convert.optimizer_state import MAIN, MOMENTS
from megatron_llmjp.convert.storage import Stored
from megatron_llmjp.errors import UserError


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
