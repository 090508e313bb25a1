"""train_tokenizer, and its tokenizer in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from data_tools.preprocess.encoding.sample import sample_texts
from data_tools.preprocess.input.sources import find_input
from data_tools.train_tokenizer import SPECIAL_TOKENS, main


def test_program_and_transformers(corpus, documents, tmp_path, capsys):
    arguments = ["--input", str(corpus), "--vocab-size", "600", "--output-dir", str(tmp_path)]
    assert main(arguments) == 0
    assert "give the same ids" in capsys.readouterr().out
    first = (tmp_path / "tokenizer.model").read_bytes()
    assert main(arguments) == 2  # not replaced without --overwrite
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--eod-token", "</s>"]) == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == first  # the same text, the same model
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [sp.id_to_piece(i) for i in range(8)] == list(SPECIAL_TOKENS)
    assert sp.id_to_piece(8) == "<0x00>" and sp.get_piece_size() == 600

    transformers = pytest.importorskip("transformers")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (fast.bos_token, fast.eos_token, fast.eos_token_id) == ("<s>", "</s>", 2)
    assert (fast.pad_token_id, fast.unk_token_id, len(fast)) == (4, 0, 600)
    text = documents[0]
    assert fast(text).input_ids == [1, *sp.encode(text)]
    assert fast.decode(fast(text).input_ids, skip_special_tokens=True) == text


def test_unsuitable_vocabulary_size_raises(corpus, tmp_path, capsys):
    for size, message in (("200", "at least 1000"), ("500000", "--vocab-size 500000:")):
        arguments = ["--input", str(corpus), "--vocab-size", size, "--output-dir", str(tmp_path)]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sample_is_bounded_and_reproducible(tmp_path):
    lines = [f"文書 {at} " + "x" * (at % 50) for at in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:2500]), encoding="utf-8")
    with (tmp_path / "b.jsonl").open("w", encoding="utf-8") as file:
        for line in lines[2500:]:
            file.write(json.dumps({"text": line}) + "\n")
        file.write('broken\n{"text": "\\ud800"}\n')
    sources = find_input([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]).sources
    assert sample_texts(sources, ["text"], 10**9) == lines
    some = sample_texts(sources, ["text"], 50_000)
    assert some == sample_texts(sources, ["text"], 50_000)
    assert 20_000 < sum(len(text.encode()) for text in some) <= 50_000
    share = sum(text in set(lines[:2500]) for text in some) / len(some)
    assert 0.4 < share < 0.6
    assert Path(sources[0].name).name == "a.txt"
