"""The tokenizers that datasets were made with, as their manifests record them. Without torch.

``preprocess_data`` records its tokenizer in ``PREFIX.json``. Datasets of other programs have no
manifest: of these only the token ids can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.errors import UserError
from megatron_llmjp.formatting import format_names
from megatron_llmjp.tokenizers.registry import Identity, describe, key_of

ALLOW = "--allow-tokenizer-mismatch"


def recorded_tokenizer(prefix: str | Path) -> dict[str, Any] | None:
    """The tokenizer that preprocess_data recorded with a dataset; None where it recorded none."""
    try:
        manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        found = manifest["recipe"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # Megatron-LM's datasets have no manifest
    return found if isinstance(found, dict) else None


def mixed_tokenizer_warnings(paths: Iterable[str]) -> list[str]:
    """A warning where datasets were made with different tokenizers."""
    makers = _makers(paths)
    if len(makers) < 2:
        return []
    groups = "; ".join(
        f"{format_names(paths)} by {describe(who)}" for who, paths in makers.values()
    )
    return [f"the datasets were made with different tokenizers: {groups}"]


def tokenizer_mismatches(paths: Iterable[str], tokenizer: Identity) -> list[str]:
    """One line for each other tokenizer than the run's that made a dataset."""
    return [
        f"{format_names(paths)} was made with another tokenizer than the run's: {describe(who)}, "
        f"not {describe(tokenizer)}"
        for key, (who, paths) in _makers(paths).items()
        if key != key_of(tokenizer)
    ]


def check_dataset_tokenizers(paths: Iterable[str], tokenizer: Identity, allowed: bool) -> list[str]:
    """Refuse datasets that were made with another tokenizer than the run's.

    Returns:
        Warnings, where ``allowed``.

    Raises:
        UserError: a dataset's manifest records another tokenizer, and this is not ``allowed``.
    """
    found = tokenizer_mismatches(paths, tokenizer)
    if not found or allowed:
        return [f"{line}; accepted by {ALLOW}" for line in found]
    raise UserError(
        "\n".join(found) + "\n  The model would be trained on ids that mean something else. Give "
        "the tokenizer of the datasets (--tokenizer-type, --tokenizer-model), make them again with "
        f"preprocess_data, or accept the difference with {ALLOW}"
    )


def check_largest_ids(
    datasets: Mapping[str, DatasetInfo], vocab_size: int, tokenizer: Identity
) -> None:
    """Refuse datasets with token ids beyond the vocabulary, as far as they were read for it.

    Args:
        datasets: what is known of each dataset, by path.
        vocab_size: ids must be in ``[0, vocab_size)``.
        tokenizer: the run's, for the message.

    Raises:
        UserError: naming such datasets and their largest ids.
    """
    found = {path: info.largest_id for path, info in datasets.items() if info.largest_id}
    beyond = [
        f"{path} (id {largest:,})" for path, largest in found.items() if largest >= vocab_size
    ]
    if beyond:
        raise UserError(
            f"token ids beyond the vocabulary, which ends at {vocab_size - 1:,} with "
            f"{describe(tokenizer)}: {format_names(beyond)}\n  Give the tokenizer that the "
            "datasets were made with, or make them again with preprocess_data"
        )


def _makers(paths: Iterable[str]) -> dict[Hashable, tuple[dict[str, Any], list[str]]]:
    """Each tokenizer that made a dataset, and the datasets."""
    makers: dict[Hashable, tuple[dict[str, Any], list[str]]] = {}
    for path in sorted(paths):
        found = recorded_tokenizer(path)
        if found is not None:
            makers.setdefault(key_of(found), (found, []))[1].append(path)
    return makers
