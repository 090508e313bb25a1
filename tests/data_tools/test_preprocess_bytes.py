"""preprocess_data, compared with megatron-core's builder and the tokenizer libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools.preprocess_data import main
from data_tools.train_tokenizer import train_unigram


def megatron_lm(prefix: Path, documents, encode, eod, vocab_size, append_eod=True) -> None:
    """Write documents as Megatron-LM's tools/preprocess_data.py does (its Encoder.encode)."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for sentences in documents:
        ids, lengths = [], []
        for sentence in [sentences] if isinstance(sentences, str) else sentences:
            sentence_ids = encode(sentence)
            if len(sentence_ids) > 0:
                ids.extend(sentence_ids)
                lengths.append(len(sentence_ids))
        if len(ids) > 0 and append_eod:
            ids.append(eod)
            lengths[-1] += 1
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")


def assert_same_files(ours: Path, theirs: Path) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()


@pytest.fixture(scope="module")
def processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
def test_same_bytes_as_megatron(
    kind, workers, corpus, documents, model, processor, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "data_tools.preprocess.input.blocks.BLOCK_BYTES", 3000
    )  # many blocks, with lines that span them
    monkeypatch.setattr("data_tools.preprocess.input.blocks.PEEK_BYTES", 100)
    bos = [1] if kind == "Llama2Tokenizer" else []
    eod = 2 if kind == "Llama2Tokenizer" else 7
    megatron_lm(tmp_path / "theirs", documents, lambda t: bos + processor.encode(t), eod, 700)
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "new" / "ours")]
    arguments += ["--tokenizer-type", kind, "--tokenizer-model", str(model), "--append-eod"]
    assert main([*arguments, "--workers", workers]) == 0
    assert_same_files(tmp_path / "new" / "ours_text_document", tmp_path / "theirs")
    assert len(list((tmp_path / "new").iterdir())) == 3  # .bin .idx .json, no temporary files


def test_hugging_face_and_no_eod(corpus, documents, tokenizer_folder, tmp_path):
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    megatron_lm(
        tmp_path / "theirs", documents, lambda t: fast.encode(t).ids, 7, 700, append_eod=False
    )
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "ours")]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer"]
    assert main([*arguments, "--tokenizer-model", str(tokenizer_folder)]) == 0
    assert_same_files(tmp_path / "ours_text_document", tmp_path / "theirs")


def test_fast_encoder_only_if_ids_are_equal(
    corpus, documents, model, tokenizer_folder, tmp_path, capsys
):
    arguments = ["--input", str(corpus), "--tokenizer-type", "HuggingFaceTokenizer"]
    arguments += ["--tokenizer-model", str(tokenizer_folder), "--append-eod", "--output-prefix"]
    assert main([*arguments, str(tmp_path / "slow")]) == 0
    fast = ["--fast-encoder", str(model)]
    assert main([*arguments, str(tmp_path / "fast"), *fast]) == 0
    assert "the same ids as the Hugging Face tokenizer" in capsys.readouterr().err
    assert_same_files(tmp_path / "fast_text_document", tmp_path / "slow_text_document")
    manifest = json.loads((tmp_path / "fast_text_document.json").read_text())
    assert list(manifest["recipe"]["tokenizer"]["encoded_by"]["files"]) == ["tokenizer.model"]

    (tmp_path / "other.model").write_bytes(train_unigram(documents[:50], 450))
    fast = ["--sentencepiece-twin", str(tmp_path / "other.model")]
    assert main([*arguments, str(tmp_path / "other"), *fast]) == 0
    assert "Not encoding with" in capsys.readouterr().err
    assert_same_files(tmp_path / "other_text_document", tmp_path / "slow_text_document")


def test_sentences_empty_documents_and_large_vocabulary(tmp_path):
    texts = [["1 2", "", "3"], "", "70000", [], "5"]
    lines = [json.dumps({"a": text, "b": "7 8"}) for text in texts]
    (tmp_path / "in.jsonl").write_text(
        "\n".join(lines) + "\n"
    )  # the lists are Megatron's sentences
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "ours")]
    arguments += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "80000", "--append-eod"]
    assert main([*arguments, "--json-keys", "a", "b"]) == 0

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split()]

    for key, documents in (("a", texts), ("b", ["7 8"] * 5)):
        megatron_lm(tmp_path / key, documents, numbers, 80000, 80001)
        assert_same_files(tmp_path / f"ours_{key}_document", tmp_path / key)
    read = IndexedDataset(str(tmp_path / "ours_a_document"))
    assert read.index.dtype is np.int32
    assert [list(read[i]) for i in range(len(read))] == [
        [1, 2],
        [3, 80000],
        [70000, 80000],
        [5, 80000],
    ]
    assert list(read.document_indices) == [0, 2, 2, 3, 3, 4]


def test_bos_before_each_document(tmp_path, model, capsys):
    """Once per document, also with several sequences; not for an empty one."""
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    texts = ["a", ["b", "c"], "", "d e"]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer-model", str(model)]
    arguments += ["--append-eod", "--workers", "1", "--tokenizer-type"]
    for flag in ("--append-bos", "--prepend-bos"):
        prefix = ["--output-prefix", str(tmp_path / flag[2:])]
        assert main([*arguments, "SentencePieceTokenizer", flag, *prefix]) == 0
        read = IndexedDataset(str(tmp_path / f"{flag[2:]}_text_document"))
        assert [list(read[i]) for i in range(len(read))] == [
            [1, *encode("a"), 7],
            [1, *encode("b")],
            [*encode("c"), 7],
            [1, *encode("d e"), 7],
        ]
    prefix = ["--append-bos", "--output-prefix", str(tmp_path / "x")]
    assert main([*arguments, "Llama2Tokenizer", *prefix]) == 2
    assert main([*arguments, "ByteLevelTokenizer", *prefix]) == 2
    assert "has no BOS token" in capsys.readouterr().err


def test_ids_are_stored_exactly_or_rejected(tmp_path, monkeypatch, capsys):
    """A vocabulary of four tokens whose largest id exceeds uint16, and one with a wrong size."""
    words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 70000}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    lines = ['{"text": "a"}', "", '{"text": "a a"}', '{"text": "a b a"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer-model", str(tmp_path)]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer", "--workers", "1", "--output-prefix"]
    assert main([*arguments, str(tmp_path / "o")]) == 0
    read = IndexedDataset(str(tmp_path / "o_text_document"))
    assert [list(read[i]) for i in range(3)] == [[2], [2, 2], [2, 70000, 2]]

    kind = "megatron_llmjp.tokenizers.hugging_face.HuggingFaceTokenizer"
    monkeypatch.setattr(f"{kind}.vocab_size", property(lambda _: 4, lambda *_: None), raising=False)
    assert main([*arguments, str(tmp_path / "p"), "--on-error", "skip"]) == 2
    assert (
        f"{tmp_path / 'in.jsonl'}:4: the tokenizer returned token id 70000"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "p_text_document.idx").exists()
