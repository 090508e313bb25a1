"""Boundaries of the documents in a micro-batch, to which attention is restricted.

The boundaries take the place of megatron-core's ``[b, 1, s, s]`` mask, of which one is 16 MiB per
sample of 4,096 tokens; they are a few numbers, from which each attention kernel derives its mask
(``model/attention.py``). They are computed in the data workers, so that their number, which is
the shape of a tensor, is known to the host without waiting for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import default_collate

DOCUMENT_STARTS = "document_starts"
"""Key of a sample: positions ``[n]`` at which its documents start, ascending from 0; int32."""
DOCUMENT_BOUNDARIES = "document_boundaries"
"""Key of a micro-batch: the boundaries of its documents, see :func:`collate`."""

_MULTIPLE = 8
"""Documents of a micro-batch are counted in multiples of this, so that few shapes occur."""


def document_starts(tokens: Tensor, end_of_document: int) -> Tensor:
    """Return the positions ``[n]`` of a sample's tokens ``[s]`` at which documents start.

    A sample starts a document, and so does each token after an end-of-document token, as in
    megatron-core's ``_get_ltor_masks_and_position_ids``.
    """
    inner = torch.nonzero(tokens[:-1] == end_of_document).flatten() + 1
    return torch.cat([inner.new_zeros(1), inner]).int()


def collate(samples: list[dict[str, Tensor]], boundaries_only: bool = False) -> dict[str, Tensor]:
    """Return the micro-batch of b samples, with the boundaries of their documents if they have any.

    The boundaries are positions in the micro-batch's tokens ``[b * s]``, sample after sample:
    document i is ``[boundaries[i], boundaries[i + 1])``. They are an int32 tensor ``[n + 1]`` that
    ascends from 0 to b * s, the layout that kernels for sequences of different lengths call
    cumulative sequence lengths. The last documents may be empty.

    Args:
        samples: the samples; :data:`DOCUMENT_STARTS` has a different length in each.
        boundaries_only: omit everything else.
    """
    if DOCUMENT_STARTS not in samples[0]:
        return dict(default_collate(samples))
    length = len(samples[0]["tokens"])
    boundaries = {DOCUMENT_BOUNDARIES: _boundaries([x[DOCUMENT_STARTS] for x in samples], length)}
    if boundaries_only:
        return boundaries
    rows = [{k: v for k, v in sample.items() if k != DOCUMENT_STARTS} for sample in samples]
    return {**default_collate(rows), **boundaries}


def _boundaries(starts: list[Tensor], length: int) -> Tensor:
    """Join the document starts of samples of ``length`` tokens, and add their end."""
    joined = torch.cat([start + i * length for i, start in enumerate(starts)])
    count = -(-len(joined) // _MULTIPLE) * _MULTIPLE
    boundaries = torch.full((count + 1,), len(starts) * length, dtype=torch.int32)
    boundaries[: len(joined)] = joined
    return boundaries
