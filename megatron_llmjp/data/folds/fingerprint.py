"""What a checkpoint stores about the folds it was trained on.

What a checkpoint remembers of a fold it was trained on, and how a fold differs from that.

The copy of a fold file that a checkpoint keeps, so that its samples can be told for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from megatron_llmjp.data.folds.schema import FoldFile


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetFingerprint(_Record):
    """What a fold drew from one dataset."""

    path: str
    key: str
    """Digest of the dataset's contents."""
    asked: str = ""
    """The amount in the fold file, such as ``weight 3``."""
    start: int
    samples: int
    checksums: str = ""
    """Of its files, where its manifest stated them."""


class FoldFingerprint(_Record):
    """A fold, as far as it decides which samples are trained on."""

    digest: str
    seed: int | None = None
    sequence_length: int | None = None
    first_sample: int = 0
    samples: int = 0
    order: str = "folds"
    split: str | None = None
    datasets: dict[str, DatasetFingerprint] | None = None
    """By name; None in checkpoints of before these were stored."""


def fold_differences(old: FoldFingerprint, new: FoldFingerprint) -> list[str]:
    """How a fold differs from what a checkpoint says of it; empty when it does not."""
    if new.digest == old.digest:
        pairs = ((n, r, (new.datasets or {}).get(n)) for n, r in (old.datasets or {}).items())
        return [
            f"dataset {name}: contents of {after.path} changed, by the checksums in its manifest"
            for name, before, after in pairs
            if after and before.checksums and after.checksums not in ("", before.checksums)
        ]
    if old.datasets is None or new.datasets is None:
        return ["it has changed (the checkpoint is too old to say how)"]
    found = [*_of_the_fold(old, new), *_of_the_datasets(old.datasets, new.datasets)]
    return found or ["the order of its datasets has changed"]


def _of_the_fold(old: FoldFingerprint, new: FoldFingerprint) -> Iterator[str]:
    for name in ("seed", "sequence_length", "order", "split"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield f"{name} {before} -> {after}"
    if old.first_sample != new.first_sample:
        yield f"it begins at sample {new.first_sample:,} instead of {old.first_sample:,}"
    if old.samples != new.samples:
        yield f"it has {new.samples:,} samples instead of {old.samples:,}"


def _of_the_datasets(
    old: dict[str, DatasetFingerprint], new: dict[str, DatasetFingerprint]
) -> Iterator[str]:
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            yield f"dataset {name} is gone"
            continue
        changes = list(_of_a_dataset(before, after))
        if changes:
            yield f"dataset {name}: {', '.join(changes)}"
    for name in new.keys() - old.keys():
        yield f"dataset {name} is new"


def _of_a_dataset(old: DatasetFingerprint, new: DatasetFingerprint) -> Iterator[str]:
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
        yield f"goes on from sample {new.start:,} of its stream instead of {old.start:,}"


def dump_fold_file(file: FoldFile) -> str:
    """A fold file as text, complete and with absolute paths.

    Reading it back gives the same schedule from any folder.
    """
    content = file.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(_absolute(content), sort_keys=False, allow_unicode=True)


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(Path(entry).absolute())
        if key == "path" and isinstance(entry, str)
        else _absolute(entry)
        for key, entry in value.items()
    }
