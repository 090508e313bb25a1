"""Sample order and digests, compared with those that earlier versions gave (golden_order.json).

Checkpoints of earlier versions depend on them. ``documents`` and ``megatron`` were recorded before
``shuffle: blocks`` existed, by the code of that time; ``blocks`` when it was introduced.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.tokenizers import load_tokenizer

GOLDEN = json.loads(Path(__file__).with_name("golden_order.json").read_text())
LENGTH = 16
DOCUMENTS = {"a": 30, "b": 4500, "c": 9}
FOLDS = [
    {"name": "whole", "epochs": 1, "blend": {"a": {"path": "a"}, "b": {"path": "b"}}},
    {"name": "again", "tokens": 500 * LENGTH, "blend": {
        "a": {"path": "a", "weight": 3, "repeat": True},
        "c": {"path": "c", "weight": 0.7, "repeat": True},
        "b": {"path": "b", "weight": 11.1, "repeat": True},
    }},
    {"name": "more", "blend": {"a": {"path": "a", "epochs": 2.5, "repeat": True}}},
]  # fmt: skip
MEGATRON = [{
    "name": "theirs", "order": "megatron", "samples": 300, "split": "9,1,0", "blend": {
        "a": {"path": "a", "weight": 0.21}, "b": {"path": "b", "weight": 0.7},
        "c": {"path": "c", "weight": 0.09},
    },
}]  # fmt: skip
CASES = {"documents": {"folds": FOLDS}, "megatron": {"folds": MEGATRON},
         "blocks": {"folds": FOLDS, "shuffle": "blocks"}}  # fmt: skip


def write_data(folder: Path) -> None:
    """Write datasets with unique tokens, whose contents depend on no random generator."""
    for place, (name, documents) in enumerate(DOCUMENTS.items()):
        lengths = (np.arange(documents) * 7919 % 43 + (place + 1)).astype(np.int32)
        writer = IndexedDatasetWriter(folder / f"{name}.bin", np.dtype(np.int32))
        first = place * 10**6
        writer.add(np.arange(first, first + lengths.sum(), dtype=np.int32), lengths)
        writer.finish(folder / f"{name}.idx")
        writer.clean()


def order_of(folder: Path, content: dict) -> dict[str, object]:
    """Return digests of the folds, of the origins of all samples, and of the tokens of a fifth."""
    for fold in content["folds"]:
        for source in fold["blend"].values():
            if fold.get("order") == "megatron":
                source["repeat"] = True
    (folder / "folds.yaml").write_text(yaml.safe_dump({"seed": 5, **content}))
    file = read_fold_file(folder / "folds.yaml")
    sizes = BatchSizeSchedule(parse(["--config", "laptop-llama", "--global-batch-size", "8"])[0])
    schedule = resolve_folds(file, inspect_datasets(file), LENGTH, sizes)
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=99)
    data = FoldDataset(
        schedule, EpochDatasets(DataConfig(seq_length=LENGTH), tokenizer, folder / "cache")
    )
    found: dict[str, object] = {}
    for fold in schedule.folds:
        origins, tokens = [], 0
        for number in range(fold.first_sample, fold.end):
            piece, inside = data.locate(number)
            origins.append([piece.name, int(inside)])
            sample = data[number] if number % 5 == 0 else {}
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                if sample:
                    tokens = zlib.crc32(sample[name].numpy().tobytes(), tokens)
        found[fold.name] = {
            "digest": fold.digest,
            "samples": fold.samples,
            "first": origins[:8],
            "origins": zlib.crc32(json.dumps(origins).encode()),
            "tokens": tokens,
        }
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_that_of_earlier_versions(tmp_path, case):
    write_data(tmp_path)
    assert order_of(tmp_path, CASES[case]) == GOLDEN[case]
