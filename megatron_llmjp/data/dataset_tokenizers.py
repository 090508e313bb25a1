"""Checks that datasets were tokenized with the run's tokenizer; does not import torch.

``preprocess_data`` records its tokenizer in the manifest ``PREFIX.json``. Datasets of other
programs have no manifest: only their token ids can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.errors import UserError
from megatron_llmjp.formatting import format_names
from megatron_llmjp.tokenizers.registry import Identity, describe_identity, identity_key

ALLOW = "--allow-tokenizer-mismatch"


def recorded_tokenizer(prefix: str | Path) -> dict[str, Any] | None:
    """Return the tokenizer recorded in a dataset's manifest, or None if there is no such record."""
    try:
        manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        found = manifest["recipe"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # Megatron-LM's datasets have no manifest
    return found if isinstance(found, dict) and _is_identity(found) else None


def _is_identity(found: Mapping[str, Any]) -> bool:
    """Return whether a manifest's record has the types of ``Tokenizer.identity``."""
    numbers = (found.get("vocab_size"), found.get("eod_id"))
    return isinstance(found.get("type"), str | None) and all(
        isinstance(number, int | None) for number in numbers
    )


def mixed_tokenizer_warnings(paths: Iterable[str]) -> list[str]:
    """Return a warning if the datasets were tokenized with different tokenizers."""
    by_tokenizer = _datasets_by_tokenizer(paths)
    if len(by_tokenizer) < 2:
        return []
    groups = "; ".join(
        f"{format_names(paths)} by {describe_identity(other)}"
        for other, paths in by_tokenizer.values()
    )
    return [f"the datasets were tokenized with different tokenizers: {groups}"]


def tokenizer_mismatches(paths: Iterable[str], tokenizer: Identity) -> list[str]:
    """Return one line for each recorded tokenizer that is not the run's."""
    return [
        f"{format_names(paths)} was tokenized with another tokenizer than the run's: "
        f"{describe_identity(other)}, not {describe_identity(tokenizer)}"
        for key, (other, paths) in _datasets_by_tokenizer(paths).items()
        if key != identity_key(tokenizer)
    ]


def check_dataset_tokenizers(paths: Iterable[str], tokenizer: Identity, allowed: bool) -> list[str]:
    """Check that the datasets were tokenized with the run's tokenizer.

    Returns:
        One warning for each mismatch, if mismatches are ``allowed``.

    Raises:
        UserError: a manifest records another tokenizer, and ``allowed`` is False.
    """
    found = tokenizer_mismatches(paths, tokenizer)
    if not found or allowed:
        return [f"{line}; accepted by {ALLOW}" for line in found]
    raise UserError(
        "\n".join(found) + "\n  The same ids stand for different tokens in the two vocabularies. "
        "Give the tokenizer of the datasets (--tokenizer-type, --tokenizer-model), rebuild them "
        f"with preprocess_data, or accept the difference with {ALLOW}"
    )


def check_largest_ids(
    datasets: Mapping[str, DatasetInfo], vocab_size: int, tokenizer: Identity
) -> None:
    """Check the largest token id found in each dataset against the vocabulary.

    Large datasets are sampled, so an id outside the vocabulary can be missed.

    Args:
        datasets: dataset facts by path.
        vocab_size: ids must be in ``[0, vocab_size)``.
        tokenizer: the run's tokenizer, for the message.

    Raises:
        UserError: ids are out of range; the message names the datasets and their largest ids.
    """
    found = {path: info.largest_id for path, info in datasets.items() if info.largest_id}
    beyond = [
        f"{path} (id {largest:,})" for path, largest in found.items() if largest >= vocab_size
    ]
    if beyond:
        raise UserError(
            f"token ids outside the vocabulary, whose largest id is {vocab_size - 1:,} with "
            f"{describe_identity(tokenizer)}: {format_names(beyond)}\n  Give the tokenizer that "
            "the datasets were tokenized with, or rebuild them with preprocess_data"
        )


def _datasets_by_tokenizer(
    paths: Iterable[str],
) -> dict[Hashable, tuple[dict[str, Any], list[str]]]:
    """Group datasets by recorded tokenizer; datasets without a record are omitted."""
    by_tokenizer: dict[Hashable, tuple[dict[str, Any], list[str]]] = {}
    for path in sorted(paths):
        found = recorded_tokenizer(path)
        if found is not None:
            by_tokenizer.setdefault(identity_key(found), (found, []))[1].append(path)
    return by_tokenizer
