"""BOS for every tokenizer type, and the special tokens that transformers adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.inspect_dataset import main as inspect_dataset
from data_tools.preprocess_data import main
from megatron_llmjp.config.tokenizer_types import TOKENIZER_TYPES
from megatron_llmjp.tokenizers import load_tokenizer
from tests.support.tokenizer_files import TEXTS, byte_level_bpe, write_gpt2, write_tiktoken

TEXT = "a b 1"
BOS = {
    # None: rejected
    "SentencePieceTokenizer": 1,
    "GPTSentencePieceTokenizer": 1,
    "Llama2Tokenizer": None,
    "HuggingFaceTokenizer": 1,
    "GPT2BPETokenizer": 0,
    "TikTokenizer": 1,
    "ByteLevelTokenizer": None,
    "NullTokenizer": None,
}


def flags_of(kind: str, folder: Path, model: Path) -> list[str]:
    """Return the flags for a tokenizer of this type."""
    flags = ["--tokenizer-type", kind, "--workers", "1"]
    if kind == "GPT2BPETokenizer":
        vocab, merges = write_gpt2(folder / "gpt2-vocab.json", folder / "gpt2-merges.txt")
        return [*flags, "--vocab-file", str(vocab), "--merge-file", str(merges)]
    if kind == "TikTokenizer":
        return [*flags, "--tokenizer-model", str(write_tiktoken(folder / "v.json", 300))]
    if kind in ("ByteLevelTokenizer", "NullTokenizer"):
        return [*flags, "--vocab-size", "10"]
    is_folder = kind == "HuggingFaceTokenizer"
    return [*flags, "--tokenizer-model", str(model.parent if is_folder else model)]


def write_text(folder: Path, *texts: str) -> list[str]:
    """Write the texts and return the input flags."""
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "in.jsonl").write_text(lines)
    return ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "o")]


def sequences(folder: Path) -> list[list[int]]:
    read = IndexedDataset(str(folder / "o_text_document"))
    return [read[i].tolist() for i in range(len(read))]


@pytest.mark.parametrize("kind", TOKENIZER_TYPES)
def test_bos_for_every_type(kind: str, tmp_path: Path, model: Path, capsys) -> None:
    flags = flags_of(kind, tmp_path, model)
    words = [*write_text(tmp_path, "1 2" if kind == "NullTokenizer" else TEXT), *flags]
    bos = BOS[kind]
    if bos is None:
        assert main([*words, "--append-bos"]) == 2
        expected = "remove --append-bos" if kind == "Llama2Tokenizer" else "has no BOS token"
        assert expected in capsys.readouterr().err
        return
    assert main(words) == 0
    [plain] = sequences(tmp_path)
    assert main([*words, "--append-bos", "--append-eod", "--overwrite"]) == 0
    [ids] = sequences(tmp_path)
    assert ids[:-1] == [bos, *plain]
    capsys.readouterr()
    flags.remove("--workers")
    flags.remove("1")
    dataset = [str(tmp_path / "o_text_document"), "--documents", "0"]
    assert inspect_dataset([*dataset, *flags]) == 0
    assert TEXT in capsys.readouterr().out


def test_types_in_any_case_and_by_other_names(tmp_path: Path, model: Path, capsys) -> None:
    """Types are parsed as by pretrain_gpt."""
    words = [*write_text(tmp_path, TEXT), "--tokenizer-model", str(model), "--tokenizer-type"]
    for word in ("gptsentencepiecetokenizer", "JapaneseSentencePiece", "GPTSentencePieceTokenizer"):
        assert main([*words, word]) == 0
    assert capsys.readouterr().out.count("Already complete") == 2
    assert main([*words, "Sentence"]) == 2


def write_hugging_face(folder: Path, template: str) -> None:
    """Write a tokenizer whose template adds these tokens."""
    fast = byte_level_bpe(("<s>", "</s>"))
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>", "$A"])
def test_special_tokens_of_transformers(template: str, tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    write_hugging_face(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = write_text(tmp_path, *TEXTS[:3])
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    assert main([*words, "--tokenizer-hf-no-include-special-tokens"]) == 0
    plain = sequences(tmp_path)
    assert plain == [theirs(text, add_special_tokens=False).input_ids for text in TEXTS[:3]]
    include = "--tokenizer-hf-include-special-tokens"
    if template == "$A":
        assert main([*words, include]) == 2  # output of another recipe exists
        return
    assert main([*words, include, "--overwrite"]) == 0
    assert sequences(tmp_path) == [theirs(text).input_ids for text in TEXTS[:3]]
    capsys.readouterr()
    code = main([*words, include, "--append-bos", "--append-eod", "--overwrite"])
    error = capsys.readouterr().err
    twice = "<s>" in template
    assert (code, "remove --append-bos" in error) == (2 if twice else 0, twice)
    assert ("writes a second" in error) == ("</s>" in template)


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "SentencePieceTokenizer"])
def test_special_tokens_of_other_types(kind: str, tmp_path: Path, model: Path, capsys) -> None:
    words = [*write_text(tmp_path, TEXT), *flags_of(kind, tmp_path, model)]
    assert main([*words, "--tokenizer-hf-include-special-tokens"]) == 2
    assert f"with {kind}, --append-bos and --append-eod" in capsys.readouterr().err


def test_other_ids_of_transformers_raise(tmp_path: Path, capsys) -> None:
    """The tokenizer's Python class does not agree with its tokenizer.json."""
    pytest.importorskip("transformers")
    write_hugging_face(tmp_path, "<s> $A")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    tokenizer.tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(Exception, match="gives other ids for 'Hello"):
        tokenizer.include_special_tokens()


def test_dropped_characters_cause_a_warning(tmp_path: Path, model: Path, capsys) -> None:
    """The vocabulary has only letters, without bytes or an unknown token."""
    letters = {
        letter: number for number, letter in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz"])
    }
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    fast.save(str(tmp_path / "tokenizer.json"))
    words = [*write_text(tmp_path, "a\u732bb"), "--tokenizer-type", "HuggingFaceTokenizer"]
    assert main([*words, "--tokenizer-model", str(tmp_path)]) == 0
    assert sequences(tmp_path) == [[1, 2]]
    assert "the tokenizer drops characters" in capsys.readouterr().err
    assert main([*words, "--tokenizer-model", str(model.parent), "--overwrite"]) == 0
    assert "drops" not in capsys.readouterr().err
