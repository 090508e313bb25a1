"""Boundaries of documents in micro-batches, against the samples of megatron-core's dataset."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data import dataloader
from megatron_llmjp.data.dataset import ValidationDataset
from megatron_llmjp.data.documents import DOCUMENT_BOUNDARIES
from megatron_llmjp.data.folds.datasets import compute_keys
from megatron_llmjp.data.folds.schedule import HeldOutDataset
from megatron_llmjp.data.indices.epoch_index import DatasetTokenizer, EpochDatasets
from megatron_llmjp.tokenizers import load_tokenizer
from tests.support.datasets import VOCAB_SIZE, write_dataset

LENGTH, SAMPLES, SEED = 64, 3, 5
RESETS = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
CPU = SimpleNamespace(torch=torch.device("cpu"), is_cuda=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    write_dataset(folder / "a", 40, seed=1, length=20)
    return folder


def micro_batches(folder, rank=0, ranks=1, **options):
    """Return the micro-batches of one tensor-parallel rank; a broadcast would raise an error."""
    words = ["--config", "laptop-llama", "--micro-batch-size", SAMPLES, "--seq-length", LENGTH,
             "--num-workers", 0, "--reset-attention-mask"]  # fmt: skip
    config = parse([str(word) for word in words])[0]
    key, path = compute_keys(str(folder / "a")).key, str(folder / "a")
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=VOCAB_SIZE - 1)
    epochs = EpochDatasets(DataConfig(seq_length=LENGTH, **RESETS), tokenizer, folder / "cache")
    data = ValidationDataset(HeldOutDataset(path, key, SEED), epochs)
    state = SimpleNamespace(
        get_data_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda: 1,
        get_tensor_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_world_size=lambda: ranks,
        get_context_parallel_world_size=lambda: 1,
    )
    with mock.patch.object(dataloader, "parallel_state", state):
        end = len(data) // SAMPLES * SAMPLES
        return list(
            dataloader.micro_batches(data, config, CPU, 0, end, lambda _: SAMPLES, **options)
        )


def megatrons_batch(folder, number):
    """Return a micro-batch with megatron-core's dense mask, by megatron-core alone."""
    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=LENGTH, blend=([str(folder / "a")], None),
        split="1,0,0", path_to_cache=str(folder / "theirs"),
        tokenizer=DatasetTokenizer(VOCAB_SIZE - 1, VOCAB_SIZE), **RESETS,
    )  # fmt: skip
    tokens = IndexedDataset(str(folder / "a"))
    documents = np.arange(len(tokens), dtype=np.int32)
    data = GPTDataset(tokens, "", documents, None, Split.train, config)
    rows = [data[number * SAMPLES + i] for i in range(SAMPLES)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_micro_batches_hold_the_documents_of_megatron_core(folder):
    batches = micro_batches(folder)
    assert len(batches) > 3
    for number, batch in enumerate(batches):
        expected = megatrons_batch(folder, number)
        hidden = expected.pop("attention_mask")[:, 0]
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor), name
        assert "attention_mask" not in batch
        visible = torch.zeros(SAMPLES * LENGTH, SAMPLES * LENGTH, dtype=torch.bool)
        bounds = batch[DOCUMENT_BOUNDARIES].tolist()
        for first, end in itertools.pairwise(bounds):
            visible[first:end, first:end] = True
        for i, rows in enumerate(visible.view(SAMPLES, LENGTH, SAMPLES, LENGTH)):
            assert torch.equal(rows[:, i].tril(), ~hidden[i])
            assert not rows[:, [k for k in range(SAMPLES) if k != i]].any()  # of other samples


def test_all_tensor_parallel_ranks_read_and_middle_stages_hold_boundaries_only(folder):
    batches = micro_batches(folder)
    second = micro_batches(folder, rank=1, ranks=2)
    middle = micro_batches(folder, rank=1, ranks=2, boundaries_only=True)
    assert len(batches) == len(second) == len(middle)
    for batch, other, partial in zip(batches, second, middle, strict=True):
        assert partial.keys() == {DOCUMENT_BOUNDARIES}
        assert torch.equal(partial[DOCUMENT_BOUNDARIES], batch[DOCUMENT_BOUNDARIES])
        assert other.keys() == batch.keys()
        assert all(torch.equal(other[name], batch[name]) for name in batch)
