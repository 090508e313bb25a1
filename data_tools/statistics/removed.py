"""Numbers of documents that ``preprocess_data`` removed on request, by source and reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_tools.statistics.counts import Count

REASONS = ("filtered", "too_short", "too_long", "duplicates")
"""Reasons, in the order of the columns of tables."""
RemovedBySource = dict[str, dict[str, Count]]
"""By source and reason."""

_REMOVED = TypeAdapter(RemovedBySource)


def describe_removed(sources: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the entry ``removed`` of a manifest's ``statistics``; empty without any reason."""
    if not any(sources.values()):
        return {}
    return {"removed": {name: dict(removed) for name, removed in sources.items()}}


def read_removed(statistics: Any) -> RemovedBySource:
    """Return the entry ``removed`` of a manifest's ``statistics``; empty if there is none.

    Raises:
        ValueError: the entry has another form.
    """
    found = statistics.get("removed", {}) if isinstance(statistics, dict) else None
    try:
        return _REMOVED.validate_python(found)
    except ValidationError as error:
        raise ValueError(f"statistics: removed: {error.errors()[0]['msg']}") from None


def add_removed_by_source(total: RemovedBySource, more: Mapping[str, Mapping[str, int]]) -> None:
    """Add numbers by source and reason to others."""
    for source, removed in more.items():
        of_source = total.setdefault(source, {})
        for reason, count in removed.items():
            of_source[reason] = of_source.get(reason, 0) + count


def reasons_in(several: Iterable[Mapping[str, int]]) -> list[str]:
    """Return the reasons that occur, in the order of the columns of tables."""
    found = {reason for removed in several for reason in removed}
    return [*(reason for reason in REASONS if reason in found), *sorted(found - {*REASONS})]


def sum_removed(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum by reason."""
    total: RemovedBySource = {}
    for removed in several:
        add_removed_by_source(total, {"": removed})
    return total.get("", {})
