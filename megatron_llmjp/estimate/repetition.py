"""Use of each dataset in a run: epochs, up-sampling, and how often its tokens are trained on.

Epochs count the samples of an epoch, which omits the last tokens that do not fill a sample. In our
order, a stream of epochs, the number of times that a token is seen differs by at most one, unless
``restart`` begins epochs early; then, and in Megatron-LM's order, shares are expected values:
epochs are shuffled independently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from megatron_llmjp.data.folds.schedule import DatasetSlice, FoldPlan, Schedule
from megatron_llmjp.formatting import format_count, format_names, format_table

MAX_EPOCHS = 4
"""Up to 4 epochs, repeated data changes the loss hardly more than new data; with more repetition
the value of additional training falls to zero (Muennighoff et al. 2023, arXiv:2305.16264)."""
_ROWS_SHOWN = 40
_SMALLEST_SHARE = 0.0005
"""Shares of a dataset's tokens that are printed."""
_EVEN = 0.05
"""Relative differences of epochs between datasets that count as a mixture by size."""
_MAX_PARTIAL = 1000
"""Epochs used in part whose distribution is computed."""
_SURPLUS, _SEPARATE_EPOCH = 1.005, 0.8
"""Megatron-LM's surplus of samples per dataset, and the share of the last epoch up to which it is
shuffled separately (megatron-core, ``BlendedMegatronDatasetBuilder`` and ``GPTDataset``)."""


@dataclass(frozen=True)
class DatasetUse:
    """Use of one dataset in all folds of a run."""

    name: str
    path: str
    tokens: int
    """Tokens of one epoch."""
    trained_tokens: int
    epochs: float
    upsampling: float
    """Share of the trained tokens over the share of all datasets' tokens."""
    seen: tuple[tuple[int, float], ...]
    """Pairs of a number of times, and the share of the dataset's tokens seen as often."""


def dataset_uses(schedule: Schedule, consumed_samples: int) -> tuple[DatasetUse, ...]:
    """Return the use of each dataset in the first ``consumed_samples`` samples of a run."""
    consumed = schedule.consumed_by_dataset(consumed_samples)
    slices: dict[str, list[tuple[FoldPlan, DatasetSlice, int]]] = {}
    for fold in schedule.folds:
        for piece in fold.slices:
            samples = consumed.get((fold.name, piece.name), 0)
            slices.setdefault(piece.key, []).append((fold, piece, samples))
    names = Counter(places[0][1].name for places in slices.values())
    length, rows = schedule.sequence_length, []
    for places in slices.values():
        first, epoch = places[0][1], places[-1][1].samples_per_epoch
        samples = sum(count for _, _, count in places)
        row = DatasetUse(
            name=first.name if names[first.name] == 1 else first.path,
            path=first.path,
            tokens=epoch * length,
            trained_tokens=samples * length,
            epochs=samples / epoch,
            upsampling=1.0,
            seen=_times_seen(_coverage(*place) for place in places),
        )
        rows.append(row)
    return _with_upsampling(rows)


def _with_upsampling(rows: Sequence[DatasetUse]) -> tuple[DatasetUse, ...]:
    mean = sum(row.trained_tokens for row in rows) / sum(row.tokens for row in rows)
    return tuple(
        DatasetUse(**{**vars(row), "upsampling": row.epochs / mean if mean else 1.0})
        for row in rows
    )


@dataclass(frozen=True)
class _Coverage:
    """Epochs of a dataset that a fold uses: completely, and in part."""

    complete: int = 0
    partial: tuple[tuple[int, float], ...] = ()
    """Pairs of the number of an epoch and the share of its samples; -1: no other fold has it."""


def _coverage(fold: FoldPlan, piece: DatasetSlice, samples: int) -> _Coverage:
    """Return the use of each epoch by the first ``samples`` of a slice."""
    if samples == 0:
        return _Coverage()
    if fold.megatron is not None:
        return _megatron_coverage(fold, piece, samples)
    epoch, end = piece.samples_per_epoch, piece.start + samples
    first, last = piece.start // epoch, (end - 1) // epoch
    if first == last:
        return _Coverage(0, ((first, samples / epoch),))
    begun = ((first + 1) * epoch - piece.start) / epoch
    return _Coverage(last - first - 1, ((first, begun), (last, (end - last * epoch) / epoch)))


def _megatron_coverage(fold: FoldPlan, piece: DatasetSlice, samples: int) -> _Coverage:
    """Return the use of the epochs that Megatron-LM shuffles together, and of the last one."""
    epoch = piece.samples_per_epoch
    surplus = _SURPLUS if len(fold.slices) > 1 else 1.0
    built = max(ceil(piece.samples * surplus), 1)
    together = -(-built // epoch)
    if together > 1 and built - (together - 1) * epoch < _SEPARATE_EPOCH * epoch:
        together -= 1
    rest = max(samples - together * epoch, 0) / epoch
    last = ((-1, rest),) if rest else ()
    if samples >= together * epoch:
        return _Coverage(together, last)
    if together > _MAX_PARTIAL:  # then nearly all tokens are seen about as often
        return _Coverage(round(samples / epoch))
    return _Coverage(0, ((-1, samples / (together * epoch)),) * together)


def _times_seen(coverages: Iterable[_Coverage]) -> tuple[tuple[int, float], ...]:
    """Return the distribution of the number of epochs that contain a token.

    An epoch that is used completely contains each token. Epochs that are used partly are
    independent, so the number of those that contain a token has a Poisson binomial distribution.
    """
    complete, single = 0, []
    shared: dict[int, float] = {}
    for coverage in coverages:
        complete += coverage.complete
        for number, share in coverage.partial:
            if number < 0:
                single.append(share)
            else:
                shared[number] = shared.get(number, 0.0) + share
    chances = np.ones(1)
    for share in [*shared.values(), *single]:
        if share > 1 - 1e-12:
            complete += 1
        else:
            chances = np.convolve(chances, [1 - share, share])
    found = [(complete + times, float(chance)) for times, chance in enumerate(chances)]
    return tuple((times, chance) for times, chance in found if chance > 1e-9)


def repetition_warnings(uses: Sequence[DatasetUse]) -> list[str]:
    """Return a warning on datasets that are used for more than 4 epochs."""
    often = sorted((use for use in uses if round(use.epochs, 2) > MAX_EPOCHS), key=_by_epochs)
    if not often:
        return []
    names = format_names([f"{use.path} ({use.epochs:.2f} epochs)" for use in often])
    return [
        f"used for more than {MAX_EPOCHS} epochs: {names}: repeated data is nearly as good as new "
        f"data up to {MAX_EPOCHS} epochs, and of little value later (Muennighoff et al. 2023, "
        "arXiv:2305.16264)"
    ]


def _by_epochs(use: DatasetUse) -> float:
    return -use.epochs


def format_uses(uses: Sequence[DatasetUse]) -> str:
    """Return a table of the datasets, or "" if all are used equally and at most once."""
    epochs = [use.epochs for use in uses]
    uneven = max(abs(use.upsampling - 1) for use in uses) > _EVEN
    if max(epochs) <= 1 and not uneven:
        return ""
    ordered = sorted(uses, key=lambda use: -round(use.epochs, 2))
    heads = ("use in the run", "tokens", "trained on", "epochs", "up-sampling", "tokens seen")
    rows = [
        (
            f"  {use.name}",
            format_count(use.tokens),
            format_count(use.trained_tokens),
            f"{use.epochs:.3f}",
            f"{use.upsampling:.2f}x",
            _format_seen(use.seen),
        )
        for use in ordered[:_ROWS_SHOWN]
    ]
    more = len(ordered) - _ROWS_SHOWN
    table = format_table([heads, *rows], right=range(1, 5))
    return f"{table}\n  ... {more:,} more datasets, see --json" if more > 0 else table


def _format_seen(seen: Sequence[tuple[int, float]]) -> str:
    """Format the most frequent numbers of times of a distribution: ``1x 70.0%, 2x 30.0%``."""
    frequent = sorted(seen, key=lambda pair: -pair[1])[:3]
    frequent = [pair for pair in frequent if pair[1] >= _SMALLEST_SHARE] or frequent[:1]
    if len(frequent) == 1:
        return f"{frequent[0][0]:,}x"
    return ", ".join(f"{times:,}x {share:.1%}" for times, share in sorted(frequent))
