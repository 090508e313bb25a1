"""Fold information stored in checkpoints: fingerprints of consumed folds, and the fold file.

The fingerprint of a fold identifies the samples that it yields; :func:`fold_differences` reports
how a fold of a resumed run deviates from it. The stored fold file allows the samples of the run to
be reconstructed later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from megatron_llmjp.data.folds.schema import FoldFile, Shuffle


class _Fingerprint(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetFingerprint(_Fingerprint):
    """Samples that a fold draws from one dataset."""

    path: str
    key: str
    """Content digest of the dataset."""
    asked: str = ""
    """Amount requested in the fold file, such as ``weight 3``."""
    start: int
    samples: int
    checksums: str = ""
    """Checksums of its files, if its manifest has them."""


class FoldFingerprint(_Fingerprint):
    """Properties of a fold that determine its samples and their order."""

    digest: str
    seed: int | None = None
    sequence_length: int | None = None
    first_sample: int = 0
    samples: int = 0
    order: str = "folds"
    shuffle: Shuffle = "documents"
    """Of the whole run. Checkpoints of earlier versions, which had no other one, do not name it."""
    split: str | None = None
    datasets: dict[str, DatasetFingerprint] | None = None
    """By name; None in checkpoints of versions that did not store them."""


def fold_differences(old: FoldFingerprint, new: FoldFingerprint) -> list[str]:
    """Describe how a fold differs from its fingerprint in a checkpoint; empty if it does not."""
    if new.digest == old.digest:
        pairs = ((n, r, (new.datasets or {}).get(n)) for n, r in (old.datasets or {}).items())
        return [
            f"dataset {name}: contents of {after.path} changed (checksums in its manifest)"
            for name, before, after in pairs
            if after and before.checksums and after.checksums not in ("", before.checksums)
        ]
    if old.datasets is None or new.datasets is None:
        return ["it has changed (the checkpoint does not record how: it is of an older version)"]
    found = [*_fold_field_differences(old, new), *_blend_differences(old.datasets, new.datasets)]
    return found or ["the order of its datasets has changed"]


def _fold_field_differences(old: FoldFingerprint, new: FoldFingerprint) -> Iterator[str]:
    for name in ("seed", "sequence_length", "order", "shuffle", "split"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield f"{name} {before} -> {after}"
    if old.first_sample != new.first_sample:
        yield f"it starts at sample {new.first_sample:,} instead of {old.first_sample:,}"
    if old.samples != new.samples:
        yield f"it has {new.samples:,} samples instead of {old.samples:,}"


def _blend_differences(
    old: dict[str, DatasetFingerprint], new: dict[str, DatasetFingerprint]
) -> Iterator[str]:
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            yield f"dataset {name} was removed"
            continue
        changes = list(_dataset_differences(before, after))
        if changes:
            yield f"dataset {name}: {', '.join(changes)}"
    for name in new.keys() - old.keys():
        yield f"dataset {name} was added"


def _dataset_differences(old: DatasetFingerprint, new: DatasetFingerprint) -> Iterator[str]:
    if old.key != new.key:
        where = new.path if old.path == new.path else f"{old.path}, now {new.path},"
        yield f"contents of {where} changed"
    asked = []
    if old.asked != new.asked:
        same_kind = old.asked.split(" ")[0] == new.asked.split(" ")[0]
        after = new.asked.split(" ")[-1] if same_kind else new.asked or "no amount"
        asked = [f"{old.asked or 'no amount'} -> {after}"]
    if old.samples != new.samples:
        asked.append(f"{new.samples:,} samples instead of {old.samples:,}")
    if asked:
        yield ": ".join(asked)
    if old.start != new.start:
        yield f"continues from sample {new.start:,} of its stream instead of {old.start:,}"


def dump_fold_file(file: FoldFile) -> str:
    """Return a fold file as YAML with all includes resolved and absolute paths.

    It gives the same schedule when it is read from any folder. Declared sizes are omitted: the
    datasets exist.
    """
    content = file.model_dump(mode="json", exclude_defaults=True, exclude={"datasets"})
    return yaml.safe_dump(_with_absolute_paths(content), sort_keys=False, allow_unicode=True)


def _with_absolute_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_absolute_paths(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(Path(entry).absolute())
        if key == "path" and isinstance(entry, str)
        else _with_absolute_paths(entry)
        for key, entry in value.items()
    }
