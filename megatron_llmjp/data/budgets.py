"""Budgets and blends -> whole numbers of samples. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.fold_file import Fold
from megatron_llmjp.errors import UserError


def apportion(total: int, weights: list[float]) -> list[int]:
    """Split ``total`` in proportion to ``weights`` into integers that sum to it exactly.

    Largest remainder (Hamilton's method), with the weights as they are written: 0.1 is a tenth.
    Ties go to the earlier entry.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    whole = sum(exact)
    quotas = [total * weight / whole for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def shares(
    fold: Fold, per_epoch: Mapping[str, int], sequence_length: int, budget: int | None
) -> list[int]:
    """Samples that a fold draws from each dataset of its blend, in the blend's order.

    Args:
        fold: the fold.
        per_epoch: samples of one epoch of each dataset, by its name in the blend.
        sequence_length: tokens per sample.
        budget: what :func:`budget` says.

    Raises:
        UserError: the budget is less than one sample.
    """
    kind = fold.kind
    if budget is None and kind in (None, "epochs"):
        times = {name: source.epochs or fold.epochs or 1 for name, source in fold.blend.items()}
        return [max(1, round(times[name] * per_epoch[name])) for name in fold.blend]
    if kind is None:  # Megatron's order: the datasets' sizes are their weights
        amounts = [float(per_epoch[name]) for name in fold.blend]
    else:
        amounts = [source.amount[1] for source in fold.blend.values() if source.amount]
    total = budget if budget is not None else int(sum(amounts) // sequence_length)
    if total < 1:
        raise UserError(
            f"fold '{fold.name}': its budget is less than one sample of {sequence_length} tokens"
        )
    return apportion(total, amounts)


def budget(fold: Fold, first: int, sequence_length: int, batch_sizes: BatchSizes) -> int | None:
    """Samples of a fold that begins at position ``first``; None where its datasets decide.

    Iterations have the sizes of those that follow position ``first``, so that a fold of N
    iterations during a batch ramp-up is N iterations long. Samples that are skipped do not count:
    they must not move any position.
    """
    if fold.samples is not None:
        return fold.samples
    if fold.tokens is not None:
        return int(fold.tokens // sequence_length)
    if fold.iterations is not None:
        begun, _ = batch_sizes.iterations(first)
        return batch_sizes.consumed_after(begun + fold.iterations) - batch_sizes.consumed_after(
            begun
        )
    return None
