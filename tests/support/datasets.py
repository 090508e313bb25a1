"""Small datasets and fold files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter

VOCAB_SIZE = 100
"""Vocabulary size of NullTokenizer: ids 0 to 98, and 99 as EOD."""


def write_dataset(
    prefix: Path, documents: int, seed: int, length: int = 40, vocabulary: int = VOCAB_SIZE
) -> None:
    """Write a dataset of documents of random lengths, with tokens in a learnable pattern."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length // 2, 2 * length, documents).astype(np.int32)
    parts = []
    for n in lengths:
        steps = generator.integers(1, 4, n)
        tokens = (generator.integers(vocabulary - 1) + np.cumsum(steps)) % (vocabulary - 1)
        tokens[-1] = vocabulary - 1
        parts.append(tokens.astype(np.uint16))
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.dtype(np.uint16))
    writer.add(np.concatenate(parts), lengths)
    writer.finish(prefix.with_suffix(".idx"))
    writer.clean()


def write_folds(
    folder: Path,
    iterations: tuple[int, ...] = (6, 5, 4),
    repeat: bool = False,
    vocabulary: int = VOCAB_SIZE,
) -> Path:
    """Write two datasets, a validation set and a fold file; return the path of the fold file."""
    write_dataset(folder / "ja", 400, seed=1, vocabulary=vocabulary)
    write_dataset(folder / "en", 300, seed=2, vocabulary=vocabulary)
    write_dataset(folder / "valid", 60, seed=3, vocabulary=vocabulary)
    blends = [(1, 2), (3, 1), (1, 1)]
    folds = [
        {
            "name": f"fold{i:02d}",
            "iterations": n,
            "blend": {
                "ja": {"path": "ja", "weight": blends[i % 3][0], "repeat": repeat},
                "en": {"path": "en", "weight": blends[i % 3][1], "repeat": repeat},
            },
        }
        for i, n in enumerate(iterations)
    ]
    path = folder / "folds.yaml"
    validation = {"valid": {"path": "valid"}}
    path.write_text(yaml.safe_dump({"seed": 7, "folds": folds, "validation": validation}))
    return path
