"""The past is frozen, the future is open: whether a schedule may go on from a checkpoint.

What was trained on must still be what the schedule says: the folds touched, and the samples skipped
before the point that was reached. Everything after that point may change. Without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from megatron_llmjp.checkpoint.manifest import AcceptedOverride, Manifest
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.fingerprint import fold_differences
from megatron_llmjp.data.folds.schedule import Schedule, SkippedSamples
from megatron_llmjp.errors import UserError

SkippedRanges = Mapping[str, tuple[int, int]]
NO_SKIPPED_RANGES: SkippedRanges = MappingProxyType({})


@dataclass(frozen=True)
class RunHistory:
    """What a checkpoint remembers of the data, as later ones go on remembering it."""

    skipped_iterations: SkippedRanges = field(default_factory=dict)
    """Positions left out by ``--skip-iterations``, by its words."""
    overrides: tuple[AcceptedOverride, ...] = ()
    """Changes of the past that were accepted, oldest first."""


def apply_skip_iterations(
    schedule: Schedule,
    asked: str | None,
    manifest: Manifest | None,
    batch_sizes: BatchSizeSchedule,
    left_out: SkippedRanges = NO_SKIPPED_RANGES,
) -> tuple[Schedule, dict[str, tuple[int, int]]]:
    """Leave out what ``--skip-iterations`` says, now and in the run that is gone on with.

    A range that the checkpoint knows keeps its meaning, so that a job may be started again with the
    same command line. A new one counts iterations as that run did, or as a new run would without
    the flag. What a rollback left out is known too.

    Returns:
        The schedule with all samples to skip; positions by the words of their ranges.

    Raises:
        UserError: a range is malformed, past, or beyond the end.
    """
    known = {**(manifest.skipped_iterations if manifest else {}), **left_out}
    schedule = schedule.with_skips(schedule.skips.union(known.values()))
    new = {}
    for words in filter(None, (asked or "").replace(" ", "").split(",")):
        if words not in known:
            new[words] = _positions(words, schedule, manifest, batch_sizes)
    return schedule.with_skips(schedule.skips.union(new.values())), {**known, **new}


def describe_skipped_samples(skipped: SkippedRanges) -> list[str]:
    """What to say at the start of samples that are left out, and why."""
    return [
        f"samples {start:,} to {end - 1:,} are left out: "
        + (f"--skip-iterations {words}" if words[:1].isdigit() else words)
        for words, (start, end) in skipped.items()
    ]


def history_differences(manifest: Manifest, schedule: Schedule) -> list[str]:
    """How a schedule differs from what a checkpoint was trained on; empty when it goes on."""
    now = {fold.name: schedule.fingerprint(fold) for fold in schedule.folds}
    found = []
    for name, record in manifest.folds.items():
        if name not in now:
            found.append(f"fold '{name}' is gone from the fold file")
        elif differs := fold_differences(record, now[name]):
            found.append(f"fold '{name}' has changed: {'; '.join(differs)}")
    before = SkippedSamples.of(manifest.skips)
    end = before.position(manifest.consumed_samples - 1) + 1 if manifest.consumed_samples else 0
    if before.before(end) != schedule.skips.before(end):
        then, today = (_show(skips.before(end)) for skips in (before, schedule.skips))
        found.append(f"samples skipped so far: {then} -> {today}")
    return found


def difference_errors(folder: Path, found: list[str]) -> list[str]:
    """Messages for changes that are not accepted."""
    return [
        f"{change}\n  {folder} was trained on it as it was: going on would repeat or drop data. "
        "Set it back (folds not yet touched may change), or accept it with --override-resume folds"
        for change in found
    ]


def _positions(
    words: str, schedule: Schedule, manifest: Manifest | None, batch_sizes: BatchSizeSchedule
) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", words)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"--skip-iterations: expected iterations from 1 such as 1050-1060,2000, found '{words}'"
        )
    done = manifest.iteration if manifest else 0
    if first <= done:
        raise UserError(
            f"--skip-iterations {words}: iteration {first} is already trained, the checkpoint is "
            f"at {done}: go on from one before it (--load SAVE/iter_...)"
        )
    start, end = batch_sizes.consumed_after(first - 1), batch_sizes.consumed_after(last)
    if end > schedule.total_samples:
        possible, _ = batch_sizes.iterations(schedule.total_samples)
        raise UserError(f"--skip-iterations {words}: the run has {possible:,} iterations")
    return schedule.position(start), schedule.position(end - 1) + 1


def _show(skips: SkippedSamples) -> str:
    return ", ".join(f"[{a}, {b})" for a, b in skips.ranges) or "none"
