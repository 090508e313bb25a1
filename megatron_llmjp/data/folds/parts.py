"""Division of a fold into disjoint folds of the same mixture.

A dataset that recurs in a later fold continues where it stopped, so folds with the same amounts of
each dataset share no sample, until the dataset starts a new epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.data.folds.schedule import FoldPlan
from megatron_llmjp.data.folds.schema import BlendEntry, Fold
from megatron_llmjp.errors import UserError


def divide_fold(plan: FoldPlan, parts: int, sequence_length: int, exact: bool) -> tuple[Fold, ...]:
    """Return ``parts`` folds with equal numbers of samples of each dataset of a fold.

    Datasets that the fold uses at most once are not repeated, except for single samples where
    ``exact`` requires them. Amounts are tokens: samples times ``sequence_length``.

    Args:
        plan: the fold, from the start of its datasets.
        parts: number of folds.
        sequence_length: tokens per sample.
        exact: the folds contain exactly the fold's samples, whose number must be divisible. If
            False, up to ``parts - 1`` samples of each dataset are omitted.

    Raises:
        UserError: a dataset has fewer samples than ``parts``.
    """
    totals = [piece.samples for piece in plan.slices]
    epochs = [
        piece.samples_per_epoch if piece.samples <= piece.samples_per_epoch else 0
        for piece in plan.slices
    ]
    shares = equal_shares(totals, epochs, parts, exact)
    blend = {}
    for piece, share in zip(plan.slices, shares, strict=True):
        if share == 0:
            raise UserError(
                f"dataset '{piece.name}' ({piece.path}) has {piece.samples:,} samples of "
                f"{sequence_length:,} tokens, which cannot be divided into {parts} folds: use "
                "fewer folds, or remove the dataset"
            )
        repeat = share * parts > piece.samples_per_epoch
        tokens = share * sequence_length
        blend[piece.name] = BlendEntry(path=piece.path, tokens=tokens, repeat=repeat)
    width = max(2, len(str(parts - 1)))
    return tuple(Fold(name=f"fold{i:0{width}}", blend=blend) for i in range(parts))


def equal_shares(
    totals: Sequence[int], epochs: Sequence[int], parts: int, exact: bool
) -> list[int]:
    """Return the samples of each dataset in each of ``parts`` equal folds.

    Args:
        totals: samples of each dataset in all folds.
        epochs: samples of each dataset that must not be exceeded if possible; 0: no limit.
        parts: number of folds.
        exact: whether all folds together must have as many samples as ``totals``.
    """
    shares = [total // parts for total in totals]
    if not exact:
        return shares
    rest = sum(totals) // parts - sum(shares)
    # The largest remainder first; datasets that would begin a second epoch last.
    order = sorted(
        range(len(totals)),
        key=lambda i: (0 < epochs[i] < (shares[i] + 1) * parts, -(totals[i] % parts), i),
    )
    for i in order[:rest]:
        shares[i] += 1
    return shares
