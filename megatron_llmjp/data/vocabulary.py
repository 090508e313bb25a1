"""Token ids that no vocabulary has: found where samples are read, and named.

A model would not say so: an id in the rows that pad its embedding is trained on in silence, and
under tensor parallelism any id that no rank has counts as a row of zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_llmjp.errors import DataError


def vetted(
    sample: dict[str, torch.Tensor], data: Any, number: int, vocab_size: int | None
) -> dict[str, torch.Tensor]:
    """A sample of a GPTDataset, whose tokens are all in the vocabulary.

    Args:
        sample: with ``tokens`` and ``labels``, ``[s]``, in host memory.
        data: the GPTDataset.
        number: of the sample in it.
        vocab_size: ids are in ``[0, vocab_size)``; None for any.

    Raises:
        DataError: one is not; the dataset, the document and the id are named.
    """
    if vocab_size is None:
        return sample
    for name in ("tokens", "labels"):
        low, high = torch.aminmax(sample[name])
        if low < 0 or high >= vocab_size:
            raise DataError(_describe(data, number, vocab_size))
    return sample


def _describe(data: Any, number: int, vocab_size: int) -> str:
    """Look the documents of a sample through for the first such token."""
    row = int(data.shuffle_index[number])
    first, last = (int(place) for place in data.sample_index[row : row + 2, 0])
    path = data.dataset.path_prefix
    for place in range(first, last + 1):
        sequence = int(data.document_index[place])
        tokens = np.asarray(data.dataset[sequence]).astype(np.int64)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(wrong):
            ends = data.dataset.document_indices
            document = int(np.searchsorted(ends, sequence, side="right")) - 1
            return (
                f"dataset {path}, document {document}: token id {tokens[wrong[0]]}, but the "
                f"vocabulary ends at {vocab_size - 1}. The dataset is damaged or was made with "
                "another tokenizer: make it again with preprocess_data, or give its tokenizer"
            )
    return f"dataset {path}, sample {number}: a token id beyond {vocab_size - 1}"
