"""Data lineage, compared with the samples themselves, on data with unique tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.lineage import Lineage, read_tokens
from megatron_llmjp.run_data import resolve_data
from megatron_llmjp.tokenizers import load_tokenizer

LENGTH, BATCH = 16, 8
MODEL = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}

FOLDS = [
    {"name": "whole", "epochs": 1, "blend": {"a": {"path": "a"}, "b": {"path": "b"}}},
    {"name": "again", "tokens": 70 * LENGTH, "blend": {
        "a": {"path": "a", "weight": 3, "repeat": True},
        "c": {"path": "c", "weight": 1, "repeat": True},
    }},
    {"name": "theirs", "samples": 90, "order": "megatron", "split": "9,1,0", "blend": {
        "c": {"path": "c", "weight": 2, "repeat": True},
        "b": {"path": "b", "weight": 1, "repeat": True},
    }},
]  # fmt: skip
SKIP = [{"samples": [5, 9]}, {"samples": [60, 61]}]


def write_numbered(prefix: Path, seed: int, documents: int, first: int) -> list[range]:
    """Write documents of one to three sequences, some empty; return the tokens of each."""
    draw = np.random.default_rng(seed)
    sequences = draw.integers(1, 4, documents).astype(np.int32)
    lengths = draw.integers(0, 30, int(sequences.sum())).astype(np.int32)
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.dtype(np.int32))
    writer.add(np.arange(first, first + lengths.sum(), dtype=np.int32), lengths, sequences)
    writer.finish(prefix.with_suffix(".idx"))
    writer.clean()
    ends = first + np.cumsum(lengths)[np.cumsum(sequences) - 1]
    return [range(a, b) for a, b in zip([first, *ends[:-1]], ends, strict=True)]


@pytest.fixture(scope="module", params=["documents", "blocks"])
def run(tmp_path_factory, request):
    """Return the documents by dataset, the lineage, and the samples of all positions."""
    folder = tmp_path_factory.mktemp("lineage")
    documents = {
        name: write_numbered(folder / name, i, size, 10_000 * (i + 1))
        for i, (name, size) in enumerate({"a": 25, "b": 40, "c": 12}.items())
    }
    content = {"seed": 5, "folds": FOLDS, "skip": SKIP, "shuffle": request.param}
    (folder / "folds.yaml").write_text(yaml.safe_dump(content))
    config = Config.model_validate({"model": MODEL})
    config = replace_fields(
        config, fold_file=str(folder / "folds.yaml"), seq_length=LENGTH, global_batch_size=BATCH
    )
    data = resolve_data(config)
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=99)
    epochs = EpochDatasets(config.data, tokenizer, folder / "cache")
    every = FoldDataset(data.schedule.with_skips(type(data.schedule.skips)()), epochs)
    samples = [plain(every[position]) for position in range(len(every))]
    return documents, Lineage(data.schedule, epochs), samples, FoldDataset(data.schedule, epochs)


def plain(sample) -> list[int]:
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


def test_a_sample_is_the_tokens_of_its_documents(run):
    documents, lineage, samples, data = run
    for position, sample in enumerate(samples):
        origin = lineage.origin(position)
        assert origin.fold == lineage.schedule.fold_at_position(position).name
        assert (origin.epoch is None) == (origin.fold == "theirs")
        told = []
        for span in origin.spans:
            tokens = documents[span.dataset][span.document]
            told += tokens[span.first_token : span.first_token + span.tokens]
            assert read_tokens(span).tolist() == told[-span.tokens :]
        assert told == sample
    # Skipped samples have no number; the others are those that the data loader yields.
    numbers = [lineage.origin(position).number for position in range(len(samples))]
    assert [n for n in numbers if n is not None] == list(range(len(data)))
    assert [p for p, n in enumerate(numbers) if n is None] == [5, 6, 7, 8, 60]
    for number in (0, 5, 55, len(data) - 1):
        told = [
            documents[name][document][first : first + count]
            for name, document, first, count in lineage.documents_of(number)
        ]
        assert [token for tokens in told for token in tokens] == plain(data[number])
    with pytest.raises(IndexError, match=f"position {len(samples)} of {len(samples)}"):
        lineage.origin(len(samples))


def test_a_document_is_found_in_exactly_the_samples_that_contain_it(run):
    documents, lineage, samples, _ = run
    keys = {p.name: p.key for fold in lineage.schedule.folds for p in fold.slices}
    held = [set(sample) for sample in samples]
    for name, ranges in documents.items():
        for document, tokens in enumerate(ranges):
            expected = [p for p, sample in enumerate(held) if sample.intersection(tokens)]
            assert list(lineage.positions_of(keys[name], document)) == expected
