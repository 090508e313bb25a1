"""Megatron-LM's ``--split`` of a dataset into train, valid and test; does not import torch."""

from __future__ import annotations

import itertools
import re

import numpy as np

from megatron_llmjp.errors import UserError

SPLIT_PARTS = ("train", "valid", "test")


def split_shares(split: str) -> tuple[float, float, float]:
    """Parse Megatron-LM's ``--split`` into the shares of train, valid and test.

    Raises:
        UserError: the text does not consist of one to three shares.
    """
    found = re.findall(r"[.0-9]+", split)
    try:
        shares = [float(share) for share in found]
    except ValueError:
        shares = []
    if not 0 < len(shares) <= len(SPLIT_PARTS) or sum(shares) <= 0:
        raise UserError(
            f"split '{split}': expected the shares of train, valid and test, such as 969,30,1"
        )
    train, valid, test = [*shares, 0.0, 0.0][:3]
    return train, valid, test


def split_ends(split: str, documents: int) -> dict[str, tuple[int, int]]:
    """Return the document range ``[first, end)`` of each part of Megatron-LM's ``--split``.

    The arithmetic is that of megatron-core's ``parse_and_normalize_split`` and
    ``BlendedMegatronDatasetBuilder``, which require torch. The samples themselves are drawn by
    megatron-core.

    Raises:
        UserError: as :func:`split_shares`.
    """
    shares = (np.array(split_shares(split)) / np.sum(split_shares(split))).tolist()
    ends = [round(end * float(documents)) for end in itertools.accumulate([0, *shares])]
    return dict(zip(SPLIT_PARTS, itertools.pairwise(ends), strict=True))
