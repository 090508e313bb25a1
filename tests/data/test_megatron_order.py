"""Megatron-LM's order, compared with recorded batches of Megatron-LM and with its builder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset
from megatron_llmjp.data.folds.splits import split_ends
from megatron_llmjp.data.indices.epoch_index import DatasetTokenizer, EpochDatasets
from megatron_llmjp.errors import UserError
from megatron_llmjp.run import Run, resolve_run
from tests.data.test_dataset import lengths_of, plain, write_numbered

LLAMA_SMALL = Path(__file__).parents[1] / "parity" / "fixtures" / "llama_small"
"""Recorded Megatron-LM run: --split 100,0,0, seed 1234, 20 iterations of 8 samples of 64."""
BATCH, LENGTH = 8, 16


def run_of(*flags: object, length: int = LENGTH) -> Run:
    words = ["--config", "laptop-llama", "--tokenizer-type", "NullTokenizer", "--vocab-size", 40000]
    words += ["--seq-length", length, "--global-batch-size", BATCH, "--eval-iters", 2]
    words += ["--lr-warmup-iters", 0, *flags]
    return resolve_run(parse([str(word) for word in words])[0], 1)


def data_of(run: Run, cache: Path) -> tuple[FoldDataset, dict[str, ValidationDataset]]:
    epochs = EpochDatasets(run.config.data, run.tokenizer, cache)
    held_out = {name: ValidationDataset(h, epochs) for name, h in run.validation.items()}
    return FoldDataset(run.schedule, epochs), held_out


def test_batches_equal_those_of_megatron_lm(tmp_path):
    """With --data-path, or as the first fold of a fold file; token for token."""
    prefix = LLAMA_SMALL / "small_text_document"
    fold = {"name": "megatron", "order": "megatron", "iterations": 20, "split": "100,0,0"}
    fold["blend"] = {"small": {"path": str(prefix)}}
    then = {"name": "then", "samples": 40, "blend": {
        "small": {"path": str(prefix), "weight": 1, "repeat": True}}}  # fmt: skip
    (tmp_path / "folds.yaml").write_text(yaml.safe_dump({"folds": [fold, then]}))
    by_flag = ("--data-path", prefix, "--split", "100,0,0", "--train-iters", 20)
    with np.load(LLAMA_SMALL / "batches.npz") as batches:
        theirs = {name: batches[name].reshape(160, 64) for name in batches}
    for flags in (by_flag, ("--fold-file", tmp_path / "folds.yaml")):
        data, _ = data_of(run_of(*flags, length=64), tmp_path / "cache")
        ours = [data[number] for number in range(160)]
        for name, expected in theirs.items():
            assert np.array_equal(np.stack([sample[name] for sample in ours]), expected), name
    assert data.locate(160)[0].start == data.locate(160)[0].samples_per_epoch  # a new epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    for i, (name, documents) in enumerate({"a": 60, "b": 90, "c": 40}.items()):
        write_numbered(folder / name, lengths_of(i, documents), 10_000 * i)
    (folder / "list.txt").write_text(f"0.3 {folder / 'a'}\n0.7 {folder / 'b'}")
    parts = {"train": ["3", str(folder / "a"), "1", str(folder / "b")], "valid": str(folder / "c")}
    (folder / "parts.json").write_text(json.dumps(parts))
    return folder


WHOLE = "--split 80,15,5"
FLAGS = {
    "one dataset": ("--data-path {a}", WHOLE, 30),
    "one with a weight": ("--data-path 1.0 {a}", WHOLE, 30),
    "many epochs": ("--data-path {a}", WHOLE, 90),
    "sizes as weights": ("--data-path {a} {b} {c}", "--split 8,2", 30),
    "weights": ("--data-path 0.001 {a} 0.7 {b} 2 {c}", WHOLE, 40),
    "the same twice": ("--data-path 1 {a} 2 {a}", WHOLE, 20),
    "the default split": ("--data-args-path {list}", "", 25),
    "apart": ("--train-data-path 1 {a} 1 {b} --valid-data-path {c}", "", 25),
    "apart in a file": ("--per-split-data-args-path {parts}", "", 25),
}


def blends_of(case: str, folder: Path) -> dict:
    """Return the arguments that Megatron-LM passes to its builder for these flags."""
    a, b, c = (str(folder / name) for name in "abc")
    return {
        "one dataset": {"blend": ([a], None)},
        "one with a weight": {"blend": ([a], [1.0])},
        "many epochs": {"blend": ([a], None)},
        "sizes as weights": {"blend": ([a, b, c], None)},
        "weights": {"blend": ([a, b, c], [0.001, 0.7, 2.0])},
        "the same twice": {"blend": ([a, a], [1.0, 2.0])},
        "the default split": {"blend": ([a, b], [0.3, 0.7])},
        "apart": {"blend_per_split": [([a, b], [1.0, 1.0]), ([c], None), None]},
        "apart in a file": {"blend_per_split": [([a, b], [3.0, 1.0]), ([c], None), None]},
    }[case]


@pytest.fixture(scope="module")
def megatrons_world():
    """Provide the process group that megatron-core's builder requires."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ours(folder):
    """Build the datasets of every case, before the process group of the reference exists."""
    found = {}
    for case, (paths, split, iterations) in FLAGS.items():
        names = {name: folder / name for name in "abc"}
        names |= {"list": folder / "list.txt", "parts": folder / "parts.json"}
        flags = f"{paths} {split}".format(**names).split()
        run = run_of(*flags, "--train-iters", iterations, "--eval-interval", 10, "--seed", 77)
        data, held_out = data_of(run, folder / "cache")
        found[case] = (
            [plain(data[i]) for i in range(len(data))],
            {name: [plain(part[i]) for i in range(16)] for name, part in held_out.items()},
            [data.locate(i)[0].name for i in range(len(data))],
            run,
        )
    return found


@pytest.mark.parametrize("case", FLAGS)
def test_megatron_core_builder_gives_the_same_samples(case, folder, ours, megatrons_world):
    _, split, iterations = FLAGS[case]
    content = blends_of(case, folder)
    if "blend" in content:
        content["split"] = split.removeprefix("--split ") or "969, 30, 1"
    config = GPTDatasetConfig(
        random_seed=77, sequence_length=LENGTH, path_to_cache=str(folder / f"theirs {case}"),
        tokenizer=DatasetTokenizer(0, 99), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, **content,
    )  # fmt: skip
    if case == "the default split":
        config.split_matrix[2] = None  # it has no documents, and the builder would not terminate
    # megatron.training: eval_iters * (train_iters // eval_interval + 1) batches of validation
    sizes = [iterations * BATCH, (iterations // 10 + 1) * 2 * BATCH, 2 * BATCH]
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    samples, held_out, names, run = ours[case]
    assert len(samples) == sizes[0]
    assert samples == [plain(theirs[0][i]) for i in range(sizes[0])]
    for place, part in enumerate(("valid", "test"), 1):
        if theirs[place] is not None:
            size = len(theirs[place])
            assert held_out[part] == [plain(theirs[place][i % size]) for i in range(16)]
    assert set(held_out) == {
        part for part, data in zip(("valid", "test"), theirs[1:], strict=True) if data
    }
    planned = {piece.name: piece.samples for piece in run.schedule.folds[0].slices}
    for name, count in Counter(names).items():
        assert abs(count - planned[name]) <= len(planned)


def test_splits_equal_those_of_megatron_core():
    for split in ("969,30,1", "80,15,5", "1", "0.9, 0.1", "7,2,1"):
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        for documents in (1, 9, 60, 1000, 12345):
            for ends, (_, ours) in zip(matrix, split_ends(split, documents).items(), strict=True):
                first, end = ends or (0, 0)
                assert ours[1] - ours[0] == round(end * documents) - round(first * documents)


MISTAKES = {
    "--data-path {a}": "--data-path requires --train-iters or --train-samples",
    "--data-path {a} --train-iters 9 --fold-file x.yaml": "both --fold-file and --data-path",
    "--data-path {a} --train-data-path {b} --train-iters 9": "declare the same data",
    "--data-path {a} --data-args-path {b} --train-iters 9": "declare the same data",
    "--train-data-path {a} --split 9,1 --train-iters 9": "remove --split",
    "--valid-data-path {a} --train-iters 9": "requires --train-data-path",
    "--split 9,1": "--split divides the datasets of --data-path, which is not given",
    "--data-path 0.3 {a} x {b} --train-iters 9": "--data-path: expected datasets alone, or a "
    "weight before each; found 'x' instead of a weight",
    "--data-path 0 {a} 1 {b} --train-iters 9": "--data-path: the weight of ",
    "--data-path 1 {a} inf {b} --train-iters 9": "b must be positive, found inf",
    "--train-data-path 1 {a} x {b} --train-iters 9": "--train-data-path: expected datasets",
    "--train-data-path {a} --valid-data-path 1 {a} x {b} --train-iters 9": "--valid-data-path: exp",
    "--train-data-path {a} --test-data-path 1 {a} x {b} --train-iters 9": "--test-data-path: exp",
    "--data-args-path {wrong} --train-iters 9": "wrong.txt: expected datasets alone, or a weight",
    "--data-args-path {none} --train-iters 9": "none.txt: the list is empty",
    "--per-split-data-args-path {weighted} --train-iters 9": "weighted.json: valid: expected datas",
    "--per-split-data-args-path {empty} --train-iters 9": "empty.json: train: the list is empty: "
    "there is no training data",
    "--data-path {a} --split x --train-iters 9": "split 'x': expected the shares",
    "--data-path {a}x --train-iters 9": "ax.idx: no such file",
    "--data-args-path a/none.txt --train-iters 9": "a/none.txt: cannot read the list of datasets",
    "--per-split-data-args-path {list} --train-iters 9": "list.txt: invalid JSON",
    "--data-path {a} {b} {c} --train-iters 500": "one epoch of its datasets",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_contradictory_flags_raise(flags, folder, tmp_path):
    names = {name: folder / name for name in "abc"} | {"list": folder / "list.txt"}
    for name, text in {
        "wrong.txt": f"1 {folder / 'a'} x {folder / 'b'}",
        "none.txt": "\n",
        "weighted.json": json.dumps({"train": ["a"], "valid": "1 a x b"}),
        "empty.json": json.dumps({"train": [], "valid": ["a"]}),
    }.items():
        (tmp_path / name).write_text(text)
        names[name.partition(".")[0]] = tmp_path / name
    with pytest.raises(UserError) as caught:
        run_of(*flags.format(**names).split())
    assert MISTAKES[flags] in str(caught.value)
