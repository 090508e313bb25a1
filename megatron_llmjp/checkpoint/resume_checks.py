"""Compatibility of a data schedule with the run history in a checkpoint. Without torch.

The consumed folds and the samples skipped so far must be the same in the new schedule. Everything
after the position of the checkpoint may change.
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
    """History of the data of a run; every later checkpoint contains it."""

    skipped_iterations: SkippedRanges = field(default_factory=dict)
    """Positions skipped by ``--skip-iterations`` or a rollback, by range or reason."""
    overrides: tuple[AcceptedOverride, ...] = ()
    """Accepted differences from the run history, oldest first."""


def apply_skip_iterations(
    schedule: Schedule,
    ranges: str | None,
    manifest: Manifest | None,
    batch_sizes: BatchSizeSchedule,
    rolled_back: SkippedRanges = NO_SKIPPED_RANGES,
) -> tuple[Schedule, dict[str, tuple[int, int]]]:
    """Skip the iterations of ``--skip-iterations``, of the checkpoint and of a rollback.

    A range in the checkpoint keeps its positions, so that a job can be restarted with the same
    command line. Iteration numbers of a new range refer to the resumed run, or to a new run without
    the flag.

    Args:
        schedule: the schedule to skip samples of.
        ranges: value of ``--skip-iterations``, such as ``1050-1060,2000``.
        manifest: of the checkpoint to resume from.
        batch_sizes: batch size of each iteration.
        rolled_back: positions that a rollback skips, by reason.

    Returns:
        The schedule with all skipped samples; skipped positions by range.

    Raises:
        UserError: a range is malformed, already trained, or beyond the end of the run.
    """
    known = {**(manifest.skipped_iterations if manifest else {}), **rolled_back}
    schedule = schedule.with_skips(schedule.skips.union(known.values()))
    new = {}
    for words in filter(None, (ranges or "").replace(" ", "").split(",")):
        if words not in known:
            new[words] = _positions(words, schedule, manifest, batch_sizes)
    return schedule.with_skips(schedule.skips.union(new.values())), {**known, **new}


def describe_skipped_samples(skipped: SkippedRanges) -> list[str]:
    """Return one line per skipped range with its samples and reason, for the start of a run."""
    return [
        f"samples {start:,} to {end - 1:,} are skipped: "
        + (f"--skip-iterations {words}" if words[:1].isdigit() else words)
        for words, (start, end) in skipped.items()
    ]


def history_differences(manifest: Manifest, schedule: Schedule) -> list[str]:
    """Return the differences between a schedule and the run history; empty if compatible."""
    now = {fold.name: schedule.fingerprint(fold) for fold in schedule.folds}
    found = []
    for name, record in manifest.folds.items():
        if name not in now:
            found.append(f"fold '{name}' is missing in the fold file")
        elif differs := fold_differences(record, now[name]):
            found.append(f"fold '{name}' has changed: {'; '.join(differs)}")
    before = SkippedSamples.of(manifest.skips)
    end = before.position(manifest.consumed_samples - 1) + 1 if manifest.consumed_samples else 0
    if before.before(end) != schedule.skips.before(end):
        then, today = (_format_ranges(skips.before(end)) for skips in (before, schedule.skips))
        found.append(f"samples skipped so far: {then} -> {today}")
    return found


def difference_errors(folder: Path, found: list[str]) -> list[str]:
    """Return error messages for differences that are not accepted."""
    return [
        f"{change}\n  {folder} was trained on the original: resuming would repeat or drop data. "
        "Restore it (folds not yet consumed may change), or accept it with --override-resume folds"
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
            f"at iteration {done}: resume from an earlier one (--load SAVE/iter_...)"
        )
    start, end = batch_sizes.consumed_after(first - 1), batch_sizes.consumed_after(last)
    if end > schedule.total_samples:
        possible, _ = batch_sizes.iterations(schedule.total_samples)
        raise UserError(f"--skip-iterations {words}: the run has {possible:,} iterations")
    return schedule.position(start), schedule.position(end - 1) + 1


def _format_ranges(skips: SkippedSamples) -> str:
    return ", ".join(f"[{a}, {b})" for a, b in skips.ranges) or "none"
