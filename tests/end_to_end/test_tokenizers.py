"""Tokenizers with several files in preprocessing, training, the checkpoint and a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_tools.preprocess_data import main as preprocess
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.loading import load_config, replace_fields
from megatron_llmjp.convert.cli import main as convert
from megatron_llmjp.run_data import load_run_tokenizer
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields
from tests.support.processes import pretrain
from tests.support.tokenizer_files import TEXTS, write_gpt2, write_tiktoken
from tests.support.training import arguments


def write_data(folder: Path, flags: list[str]) -> Path:
    """Tokenize the texts and write a fold file."""
    with (folder / "raw.jsonl").open("w") as file:
        for number in range(200):
            file.write(json.dumps({"text": TEXTS[number % len(TEXTS)] + str(number)}) + "\n")
    words = ["--input", str(folder / "raw.jsonl"), "--output-prefix", str(folder / "d")]
    assert preprocess([*words, "--append-eod", "--workers", "1", *flags]) == 0
    blend = {"only": {"path": "d_text_document", "weight": 1, "repeat": True}}
    folds = {"folds": [{"name": "fold00", "iterations": 6, "blend": blend}]}
    (folder / "folds.yaml").write_text(yaml.safe_dump(folds))
    return folder / "folds.yaml"


def stored_ids(folder: Path, text: str) -> list[int]:
    """Return the ids of a text from the tokenizer in a checkpoint."""
    config = load_config(folder / manifests.CONFIG)
    stored = stored_tokenizer_fields(folder / manifests.TOKENIZER, config.data.tokenizer_type)
    tokenizer = load_run_tokenizer(replace_fields(config, **stored))
    assert tokenizer is not None
    return tokenizer.encode(text).tolist()


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "TikTokenizer"])
def test_a_run_resumes_with_the_stored_tokenizer(kind: str, tmp_path: Path) -> None:
    """A resume loads it from the checkpoint if the original files were removed."""
    if kind == "GPT2BPETokenizer":
        vocab, merges = write_gpt2(tmp_path / "words.json", tmp_path / "pairs")
        stored = {"vocab.json": vocab, "merges.txt": merges}
        flags = ["--vocab-file", str(vocab), "--merge-file", str(merges)]
    else:
        vocab = write_tiktoken(tmp_path / "words.json", 300)
        stored = {"tiktoken.json": vocab}
        flags = ["--tokenizer-model", str(vocab), "--tiktoken-pattern", "v1"]
        flags += ["--tiktoken-num-special-tokens", "8"]
    flags = ["--tokenizer-type", kind, *flags]
    folds, save = write_data(tmp_path, flags), tmp_path / "run"
    run = ["--fold-file", str(folds), "--save", str(save), "--nproc-per-node", "1"]
    words = arguments("laptop-llama", folds, *flags, *run[2:], tokenizer_type="", vocab_size="")
    done = pretrain(*words, "--exit-interval", "3")
    assert done.returncode == 3, done.stderr
    folder = manifests.newest_checkpoint(save)
    contents = {name: path.read_bytes() for name, path in stored.items()}
    kept = folder / manifests.TOKENIZER
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == contents
    text = "The cat sat on 1,234 mats.\n猫"
    config = load_config(folder / manifests.CONFIG)
    tokenizer = load_run_tokenizer(config)
    assert tokenizer is not None
    ids = tokenizer.encode(text).tolist()

    if kind == "TikTokenizer":
        done = pretrain(*run, "--tiktoken-pattern", "v2")
        assert (done.returncode, "another tokenizer than the run's" in done.stderr) == (2, True)
    for path in stored.values():
        path.unlink()
    done = pretrain(*run, "--save-interval", "1", "--keep-last", "1")
    assert done.returncode == 0, done.stderr
    assert manifests.newest_checkpoint(save).name == "iter_0000006"
    assert stored_ids(manifests.newest_checkpoint(save), text) == ids
    output = tmp_path / "hf"
    assert convert(f"--from native --to hf --input {save} --output {output}".split()) == 0
    assert {name: (output / name).read_bytes() for name in stored} == contents
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(output)
    assert theirs(text).input_ids == ids
    assert theirs.eos_token == ("<|endoftext|>" if kind == "GPT2BPETokenizer" else "</s>")
