"""What the fold schedule must know of the datasets on disk. Without torch."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_llmjp.data import indexed
from megatron_llmjp.data.fold_file import FoldFile
from megatron_llmjp.data.folds import DatasetInfo
from megatron_llmjp.errors import UserError


def inspect_sources(file: FoldFile) -> dict[str, DatasetInfo]:
    """Open every dataset of a fold file.

    Raises:
        UserError: naming all datasets that are missing or damaged, and where they are declared.
    """
    found, problems = {}, []
    for path, place in file.sources().items():
        try:
            index = indexed.read_index(path)
            found[path] = DatasetInfo(content_key(path), int(index.lengths.sum(dtype=np.int64)))
        except UserError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return found


def content_key(prefix: str) -> str:
    """A digest that changes when a dataset does, at the cost of a few reads.

    Covers the sizes of both files and blocks spread over the index, whose lengths and offsets
    change with almost any change of the tokens.
    """
    idx, size = indexed.idx_path(prefix), indexed.idx_path(prefix).stat().st_size
    digest = hashlib.sha256(f"{size}/{indexed.bin_path(prefix).stat().st_size}".encode())
    block, blocks = 1 << 16, 64
    with idx.open("rb") as stream:
        for offset in sorted({i * max(0, size - block) // (blocks - 1) for i in range(blocks)}):
            stream.seek(offset)
            digest.update(stream.read(block))
    return digest.hexdigest()[:32]
