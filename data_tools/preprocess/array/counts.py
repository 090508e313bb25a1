"""Counts of the parts of an array, added up by file as those of one job, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_tools.documents import read_dataset_manifest
from data_tools.preprocess.job.journal import SourceCounts
from data_tools.statistics.counts import read_sources, sum_counts
from data_tools.statistics.removed import read_removed
from data_tools.tables import summary_rows
from megatron_llmjp.errors import UserError

_TALLIES = TypeAdapter(list[SourceCounts])


def describe_parts(key: str, prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a merged manifest that describe the array: its division and counts.

    There are none if a part has no manifest.

    Raises:
        UserError: a manifest is damaged.
    """
    if any(read_dataset_manifest(prefix) is None for prefix in prefixes):
        return {}
    recipe = (read_dataset_manifest(prefixes[0]) or {}).get("recipe", {})
    division = {name: recipe.get("shard", {}).get(name) for name in ("count", "list")}
    return {"key": key, "array": division} | combined_counts(prefixes)


def combined_counts(prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the manifest entries with the counts of each file, those of its parts added up.

    Raises:
        UserError: a manifest is damaged.
    """
    total: dict[str, SourceCounts] = {}
    rejected: dict[str, int] = {}
    for prefix in prefixes:
        manifest = read_dataset_manifest(prefix) or {}
        sources = manifest.get("recipe", {}).get("sources", [])
        counts = _counts(prefix, manifest, len(sources))
        for source, found in zip(sources, counts, strict=True):
            of_source = total.setdefault(str(source.get("name")), SourceCounts())
            for name in ("lines", "documents", "bytes", "blank", "empty"):
                setattr(of_source, name, getattr(of_source, name) + getattr(found, name))
            for counter, more in (
                (of_source.tokens, found.tokens),
                (of_source.rejected, found.rejected),
                (of_source.removed, found.removed),
                (rejected, found.rejected),
            ):
                for name, value in more.items():
                    counter[name] = counter.get(name, 0) + value
    tallies = [
        {
            name: value
            for name, value in vars(counts).items()
            if name != "texts" and (name != "removed" or value)
        }
        for counts in total.values()
    ]
    return {"rejected": rejected, "sources": list(total), "tallies": tallies}


def without_removed(
    described: Mapping[str, Any], statistics: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the entries of :func:`describe_parts` with the documents that are left in the merge.

    Args:
        described: the entries, which count copies of a document in several parts.
        statistics: entry ``statistics`` of the merged manifest.
    """
    if not described or not statistics or "removed" not in statistics:
        return dict(described)
    texts, removed = read_sources(statistics), read_removed(statistics)
    tallies = []
    for name, counts in zip(described["sources"], described["tallies"], strict=True):
        kept = sum_counts(texts.get(name, {}).values())
        changed = {
            "documents": kept.documents,
            "tokens": {**counts["tokens"], described["key"]: kept.tokens},
            "removed": removed.get(name, {}),
        }
        tallies.append({**counts, **changed})
    return {**described, "tallies": tallies}


def table_of(manifests: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the summary table from the manifests of all merged keys."""
    first = next(iter(manifests.values()))
    names = [str(name) for name in first.get("sources", [])]
    counts = _counts(str(first.get("key")), first, len(names))
    for key, manifest in manifests.items():
        texts = read_sources(manifest["statistics"]) if "statistics" in manifest else {}
        of_key = _counts(key, manifest, len(names))
        for name, of_source, own in zip(names, counts, of_key, strict=True):
            of_source.texts[key] = texts.get(name, {})
            of_source.tokens[key] = own.tokens.get(key, 0)
    return summary_rows(names, counts, list(manifests))


def _counts(prefix: str, manifest: Mapping[str, Any], count: int) -> list[SourceCounts]:
    """Return the counts of each source in a manifest."""
    try:
        found = _TALLIES.validate_python(manifest.get("tallies"))
    except ValidationError as error:
        raise UserError(
            f"{prefix}.json: the manifest is damaged ({error.errors()[0]['msg']})"
        ) from None
    if len(found) != count:
        raise UserError(f"{prefix}.json: the manifest is damaged: counts of {len(found)} files")
    return found
