"""Errors and warnings of --dry-run and of runs before the first step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools import build_indices, train_tokenizer
from megatron_llmjp import start_checks
from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.folds import datasets as fold_datasets
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import UserError
from megatron_llmjp.planning import plan_data
from megatron_llmjp.run import resolve_run
from megatron_llmjp.start_checks import check_start
from megatron_llmjp.tokenizers import load_tokenizer
from tests.support.datasets import write_folds
from tests.support.processes import pretrain
from tests.support.training import arguments


def start(*words):
    """Resolve and check a run as its first process does; return the warnings."""
    run = resolve_run(parse([str(word) for word in words]).config, 1)
    return "\n".join(check_start(run))


def refusal(*words):
    with pytest.raises(UserError) as error:
        start(*words)
    return str(error.value)


def contents(folder):
    return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def test_dry_run_and_run_refuse_the_same_and_write_nothing(tmp_path):
    folds = write_folds(tmp_path)
    words = arguments("laptop-llama", folds, "--save", tmp_path / "folds.yaml" / "run")
    other = arguments("laptop-llama", folds, "--save", tmp_path / "new", vocab_size=50)
    before = contents(tmp_path)
    for flags, part in ((words, "folds.yaml is a file"), (other, "token ids outside the vocab")):
        dry, run = pretrain(*flags, "--dry-run"), pretrain(*flags)
        assert dry.returncode == run.returncode == 2
        assert part in dry.stderr and dry.stderr == run.stderr
        assert run.stdout == ""
    good = pretrain(*arguments("laptop-llama", folds, "--save", tmp_path / "new"), "--dry-run")
    assert good.returncode == 0, good.stderr
    assert contents(tmp_path) == before


def test_folders_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    folds = write_folds(tmp_path)
    file, link, locked = (tmp_path / name for name in ("file", "link", "locked"))
    file.touch()
    link.symlink_to(tmp_path / "gone")
    locked.mkdir()
    real = os.access
    denied = lambda path, mode, **more: path != locked and real(path, mode, **more)  # noqa: E731
    monkeypatch.setattr(start_checks.os, "access", denied)
    for flag in ("--save", "--tensorboard-dir", "--data-cache-path"):
        words = arguments("laptop-llama", folds, tensorboard_dir="")
        for place, reason in (
            (file, "is a file"),
            (file / "below", "is a file"),
            (link, "is a symbolic link to"),
            (locked / "new" / "folder", "is not writable"),
        ):
            message = refusal(*words, flag, place)
            assert message.startswith(f"{flag} {place}: ") and reason in message
        assert start(*words, flag, tmp_path / "new" / "folder") is not None
    assert not (tmp_path / "new").exists()


def test_a_complete_read_only_cache_is_accepted(tmp_path, monkeypatch):
    folds, cache = write_folds(tmp_path), tmp_path / "cache"
    words = [*arguments("laptop-llama", folds), "--data-cache-path", str(cache)]
    assert build_indices.main(words) == 0
    real = os.access
    denied = lambda path, mode, **more: path != cache and real(path, mode, **more)  # noqa: E731
    monkeypatch.setattr(start_checks.os, "access", denied)
    start(*words)
    shutil.rmtree(next(p for p in cache.iterdir() if "core" in p.name))
    assert "sample indices cannot be written there" in refusal(*words)


def test_warning_on_a_full_disk(tmp_path, monkeypatch):
    words = arguments("laptop-llama", write_folds(tmp_path), "--save", tmp_path / "save")
    assert "are free" not in start(*words)
    found = list(os.statvfs(tmp_path))
    found[4] = 1  # f_bavail
    monkeypatch.setattr(start_checks.os, "statvfs", lambda path: os.statvfs_result(found))
    assert "a checkpoint of this run takes about 54" in start(*words)
    # 0.54 MB each: folds end at 6, 11 and 15; with every second iteration there are 9.
    found[1], found[4] = 1, 2_000_000  # f_frsize
    assert "are free" not in start(*words)
    often = start(*words, "--save-interval", 2)
    assert "2MB are free, but the run will keep 9 more checkpoints of 54" in often.replace(
        ".00", ""
    )
    assert "are free" not in start(*words, "--save-interval", 2, "--keep-last", 1)


def test_runs_print_data_warnings(tmp_path):
    folds = write_folds(tmp_path)
    file = yaml.safe_load(folds.read_text())
    file["validation"]["valid"]["path"] = "ja"
    folds.write_text(yaml.safe_dump(file))
    words = arguments("laptop-llama", folds)
    found = start(*words)
    assert "is also trained on" in found
    _, planned = plan_data(parse(words).config, with_learning_rate=False)
    usual = [line for line in planned if line.startswith("used in more than one fold")]
    assert len(usual) == 1 and "used in more than one fold" not in found
    assert set(planned) - set(usual) <= set(found.splitlines())
    run = pretrain(*words, "--train-iters", 3)
    assert run.returncode == 0 and "is also trained on" in run.stderr


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two different SentencePiece models of the same size."""
    folder = tmp_path_factory.mktemp("tokenizers")
    models = []
    for name in ("one", "two"):
        text = folder / f"{name}.jsonl"
        generator = np.random.default_rng(len(models))
        lines = ["".join(chr(97 + i) for i in generator.integers(0, 26, 40)) for _ in range(300)]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        output = folder / name
        flags = ["--input", str(text), "--vocab-size", "300", "--output-dir", str(output)]
        assert train_tokenizer.main(flags) == 0
        models.append(output / "tokenizer.model")
    return models


def made_with(folder, tokenizer):
    """Record a tokenizer in the manifests of all datasets."""
    for name in ("ja", "en", "valid"):
        recipe = {"recipe": {"tokenizer": tokenizer.identity()}}
        (folder / f"{name}.json").write_text(json.dumps(recipe))


def test_another_tokenizer_than_the_datasets_is_an_error(tmp_path, tokenizers, capsys):
    folds, kind = write_folds(tmp_path), "SentencePieceTokenizer"
    one, two = tokenizers
    made_with(tmp_path, load_tokenizer(kind, one))
    copy = tmp_path / "renamed.model"
    shutil.copy(one, copy)
    base = arguments("laptop-llama", folds, tokenizer_type=kind, vocab_size="")
    for model in (one, copy):
        assert "another tokenizer" not in start(*base, "--tokenizer-model", model)
    words = [*base, "--tokenizer-model", str(two)]
    message = refusal(*words)
    assert "was tokenized with another tokenizer than the run's" in message
    assert "--allow-tokenizer-mismatch" in message
    for check in (
        lambda: plan_data(parse(words).config),
        lambda: build_indices.find_index_tasks(
            config := parse(words).config, build_indices.read_data(config), None
        ),
    ):
        with pytest.raises(UserError) as error:
            check()
        assert str(error.value) == message
    assert "accepted by --allow" in start(*words, "--allow-tokenizer-mismatch")
    # The same vocabulary with BOS before each document, or with another EOD.
    assert "another tokenizer" in refusal(
        *arguments("laptop-llama", folds, tokenizer_type="Llama2Tokenizer", vocab_size=""),
        *("--tokenizer-model", one),
    )


def test_null_tokenizers_are_equal_by_their_size(tmp_path):
    folds = write_folds(tmp_path)
    made_with(tmp_path, load_tokenizer("NullTokenizer", None, vocab_size=99))
    assert "another tokenizer" not in start(*arguments("laptop-llama", folds))
    assert "another tokenizer" in refusal(*arguments("laptop-llama", folds, vocab_size=120))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizers):
    """Arguments, without --tokenizer-model, of a run that has a checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    kind = {"tokenizer_type": "GPTSentencePieceTokenizer", "vocab_size": ""}
    words = arguments("laptop-llama", write_folds(folder), **kind)
    place = ("--save", folder / "save", "--tokenizer-model", tokenizers[0])
    run = pretrain(*words, *place, "--train-iters", 3)
    assert run.returncode == 0, run.stderr
    return words, folder / "save"


def test_resume_with_another_tokenizer_of_equal_size(tmp_path, tokenizers, saved):
    words, save = saved
    one, two = tokenizers
    copy = tmp_path / "elsewhere.model"
    shutil.copy(one, copy)
    words = [*words, "--save", save, "--tokenizer-model"]
    assert start(*words, copy) is not None
    assert f"{two} is not the tokenizer in {save / 'iter_0000003'}" in refusal(*words, two)
    flags = [*words, two, "--override-resume", "tokenizer"]
    notes = resolve_run(parse([str(flag) for flag in flags]).config, 1).notes
    assert any("accepted by --override-resume tokenizer" in note for note in notes)


def test_a_dry_run_of_a_resume_without_the_tokenizer(tmp_path, saved):
    words, save = saved
    absent = tmp_path / "absent.model"
    flags = [*words, "--save", save, "--tokenizer-model", absent, "--padded-vocab-size", 384]
    dry = pretrain(*flags, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"tokenizer {absent} is missing here and is not checked" in dry.stderr
    assert f"# resumes from {save / 'iter_0000003'}" in dry.stdout
    assert "NullTokenizer" not in dry.stdout and "lr_warmup" not in dry.stdout.split("model:")[0]


def test_finetuning_weights_of_other_shapes_is_refused(tokenizers, saved):
    words, save = saved
    words = [*words, "--tokenizer-model", tokenizers[1], "--load", save, "--finetune"]
    assert start(*words) is not None
    assert "ffn_hidden_size is 96, but the weights of" in refusal(*words, "--ffn-hidden-size", 96)


def test_the_largest_id_is_found_in_files_and_blocks(tmp_path, monkeypatch):
    for name, dtype, last in (("a", np.uint16, 65_000), ("b", np.int32, -1)):
        tokens = np.arange(1000, dtype=dtype)
        tokens[-1] = last
        writer = IndexedDatasetWriter(Path(f"{tmp_path / name}.bin"), np.dtype(dtype))
        writer.add(tokens, np.array([1000], np.int32))
        writer.finish(Path(f"{tmp_path / name}.idx"))
    expected = {"a": 65_000, "b": 2**32 - 1}
    for blocks in (None, (3, 10)):
        if blocks:
            monkeypatch.setattr(fold_datasets, "_ID_BLOCKS", blocks)
        found = {name: fold_datasets.largest_id(read_index(tmp_path / name)) for name in expected}
        assert found == expected
