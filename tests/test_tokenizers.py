"""Tokenizers compared with the libraries they are based on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data_tools.train_tokenizer import SPECIAL_TOKENS, train_unigram
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import load_tokenizer
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields
from megatron_llmjp.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face
from tests.support.tokenizer_files import write_gpt2, write_tiktoken

TEXT = "吾輩は猫である。名前はまだ無い。\nHello,  world! def main():\n        return 42 🐈\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [TEXT + Path(sentencepiece.__file__).read_text(encoding="utf-8")[:40000]]
    (folder / "tokenizer.model").write_bytes(train_unigram(texts, 500))
    export_hugging_face(SentencePieceTokenizer(folder / "tokenizer.model"), folder)
    return folder


def test_errors_name_the_type_of_another_tokenizer(folder, tmp_path):
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    sentence_piece = "is read with --tokenizer-type SentencePieceTokenizer"
    hugging_face = "is read with --tokenizer-type HuggingFaceTokenizer --tokenizer-model"
    wrong = [
        ("HuggingFaceTokenizer", model, sentence_piece),
        ("HuggingFaceTokenizer", tmp_path, sentence_piece),
        ("SentencePieceTokenizer", other, f"{hugging_face} {other}"),
        ("Llama2Tokenizer", folder, f"{hugging_face} {folder}"),
        ("Llama2Tokenizer", tmp_path, f"--tokenizer-model {tmp_path / 'tokenizer.model'}"),
    ]
    for kind, path, words in wrong:
        with pytest.raises(UserError) as error:
            load_tokenizer(kind, path)
        assert words in str(error.value), str(error.value)


def test_errors_name_the_type_of_another_json_file(folder, tmp_path):
    write_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    write_tiktoken(tmp_path / "list.json", 280)
    (tmp_path / "merges.json").write_text("[1]")
    vocab, tik, fast = tmp_path / "vocab.json", tmp_path / "list.json", folder / "tokenizer.json"
    wrong = [
        ("HuggingFaceTokenizer", tmp_path, "GPT2BPETokenizer --vocab-file"),
        ("HuggingFaceTokenizer", vocab, "GPT2BPETokenizer --vocab-file"),
        ("HuggingFaceTokenizer", tik, "TikTokenizer --tokenizer-model"),
        ("SentencePieceTokenizer", tik, "TikTokenizer --tokenizer-model"),
        ("Llama2Tokenizer", vocab, "GPT2BPETokenizer --vocab-file"),
        ("TikTokenizer", vocab, "GPT2BPETokenizer --vocab-file"),
        ("TikTokenizer", fast, "HuggingFaceTokenizer --tokenizer-model"),
        ("GPT2BPETokenizer", tik, "TikTokenizer --tokenizer-model"),
        ("GPT2BPETokenizer", fast, "HuggingFaceTokenizer --tokenizer-model"),
    ]
    for kind, path, words in wrong:
        merges = tmp_path / "merges.txt"
        with pytest.raises(UserError) as error:
            load_tokenizer(kind, path, merge_file=merges)
        assert f"it is read with --tokenizer-type {words} {path}" in str(error.value)


def test_incomplete_gpt2_vocabularies_are_refused(tmp_path):
    """The library skips characters without a token and accepts truncated merges."""
    vocab, merges = write_gpt2(tmp_path / "v.json", tmp_path / "m.txt")
    tokens, lines = json.loads(vocab.read_text()), merges.read_text().splitlines(keepends=True)
    assert load_tokenizer("GPT2BPETokenizer", vocab, merge_file=merges).vocab_size == 350
    without_a = {token: number for token, number in tokens.items() if token != "a"}
    wrong = {
        json.dumps(without_a): "1 of the 256 bytes have no token, such as 'a'",
        json.dumps(tokens | {"a": tokens["b"]}): "several tokens have id",
        json.dumps(tokens | {"zzz": 350}): "do not produce 1 tokens of .*, such as 'zzz'",
        json.dumps(tokens | {"a": 1.5}): "expected a JSON object of tokens and ids",
        vocab.read_text()[:900]: "invalid JSON",
    }
    for text, message in wrong.items():
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_tokenizer("GPT2BPETokenizer", tmp_path / "wrong.json", merge_file=merges)
    for kept in (0, 1, len(lines) - 1):
        (tmp_path / "cut.txt").write_text("".join(lines[:kept]))
        with pytest.raises(
            UserError, match=r"cut.txt: its .* merges do not produce .* file is truncated"
        ):
            load_tokenizer("GPT2BPETokenizer", vocab, merge_file=tmp_path / "cut.txt")


def test_type_of_stored_tokenizer_files(folder, tmp_path):
    """Current file names and those of earlier versions are supported."""
    fast, model = (folder / "tokenizer.json").read_bytes(), folder / "tokenizer.model"
    names = {
        ("tokenizer.json",): "HuggingFaceTokenizer",
        ("vocab.json", "merges.txt"): "GPT2BPETokenizer",
        ("gpt2-vocab.json", "gpt2-merges.txt"): "GPT2BPETokenizer",
        ("tiktoken.json",): "TikTokenizer",
        ("llm-jp.model",): "SentencePieceTokenizer",
    }
    for number, (files, kind) in enumerate(names.items()):
        stored = tmp_path / str(number)
        stored.mkdir()
        for name in files:
            (stored / name).write_bytes(fast if name == "tokenizer.json" else b"")
        assert stored_tokenizer_fields(stored)["tokenizer_type"] == kind
        assert stored_tokenizer_fields(stored, kind) == stored_tokenizer_fields(stored)
        assert stored_tokenizer_fields(stored, "ByteLevelTokenizer") == {}
    assert stored_tokenizer_fields(tmp_path / "4", "Llama2Tokenizer")["tokenizer_type"] == (
        "Llama2Tokenizer"
    )
    assert stored_tokenizer_fields(tmp_path / "nowhere", "Llama2Tokenizer") == {}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my.json").write_bytes(fast)
    found = stored_tokenizer_fields(tmp_path / "own", "HuggingFaceTokenizer")
    assert found["tokenizer_model"] == str(tmp_path / "own" / "my.json")
    mine = load_tokenizer("HuggingFaceTokenizer", tmp_path / "own" / "my.json")
    assert list(mine.files()) == ["tokenizer.json"]
    (tmp_path / "unnamed").write_bytes(model.read_bytes())
    assert list(load_tokenizer("Llama2Tokenizer", tmp_path / "unnamed").files()) == [
        "unnamed.model"
    ]


def write_words(path: Path, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """Save a Hugging Face tokenizer of whole words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(path))
    return words


def test_sentencepiece_types(folder):
    model = folder / "tokenizer.model"
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(TEXT)
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    assert tokenizer.encode(TEXT).tolist() == plain
    assert (tokenizer.eod_id, tokenizer.eos_id, tokenizer.pad_id) == (7, 2, 4)
    assert tokenizer.decode(plain) == TEXT
    assert [tokenizer.piece(i) for i in range(8)] == list(SPECIAL_TOKENS)
    llama = load_tokenizer("Llama2Tokenizer", model)
    assert llama.encode(TEXT).tolist() == [1, *plain]
    assert (llama.eod_id, llama.bos_id, llama.vocab_size) == (2, 1, 500)
    assert llama.files().keys() >= {"tokenizer.model", "tokenizer.json"}
    assert list(llama.identity()["files"]) == ["tokenizer.model"]


def test_special_tokens_in_the_text_are_recognized(folder):
    """Megatron-LM's SentencePieceTokenizer splits the text at literal special tokens."""
    model = folder / "tokenizer.model"
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    ids = load_tokenizer("SentencePieceTokenizer", model).encode("a</s>b<EOD><MASK> c<s>")
    assert ids.tolist() == [*encode("a"), 2, *encode("b"), 7, 3, *encode(" c"), 1]
    assert load_tokenizer("Llama2Tokenizer", model).encode("a</s>").tolist() == [
        1,
        *encode("a</s>"),
    ]


def test_added_special_tokens_get_ids_after_the_model(folder, tmp_path):
    raw = (folder / "tokenizer.model").read_bytes()  # as in LLM-jp's ver2.1: <mask>, no <MASK>
    (tmp_path / "m.model").write_bytes(raw.replace(b"<MASK>", b"<mask>"))
    tokenizer = load_tokenizer("SentencePieceTokenizer", tmp_path / "m.model")
    assert tokenizer.vocab_size == 501
    assert tokenizer.encode("<MASK>").tolist() == [500]
    assert tokenizer.piece(500) == "<MASK>"
    (tmp_path / "e.model").write_bytes(raw.replace(b"<EOD>", b"<eod>"))
    assert load_tokenizer("SentencePieceTokenizer", tmp_path / "e.model").eod_id == 2


def test_hugging_face_export_gives_the_same_ids(folder, tmp_path):
    ids = load_tokenizer("SentencePieceTokenizer", folder / "tokenizer.model").encode(TEXT)
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer("HuggingFaceTokenizer", path)
        assert tokenizer.encode(TEXT).tolist() == ids.tolist()
        assert np.array_equal(tokenizer.encode_batch([TEXT, ""])[0], ids)
        assert tokenizer.decode(ids) == TEXT
        assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (7, 1, 4)
    bare = tmp_path / "bare.json"
    bare.write_bytes((folder / "tokenizer.json").read_bytes())
    assert load_tokenizer("HuggingFaceTokenizer", bare).eod_id == 7


@pytest.mark.parametrize("extra", ["", "<0 0x x0 x41 0A A> 41> 00 "])
def test_literal_byte_tokens_are_text(extra, tmp_path):
    """The characters <0x0A> are not a newline, even if pieces span every possible split."""
    texts = [TEXT + extra * 50 + Path(sentencepiece.__file__).read_text(encoding="utf-8")[:40000]]
    (tmp_path / "tokenizer.model").write_bytes(train_unigram(texts, 480))
    export_hugging_face(SentencePieceTokenizer(tmp_path / "tokenizer.model"), tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    for text in ("a<0x0A>b", "<0x41><0x0A>\n", "<0x0", "<<0xE3>> 0x0A>", " <0x0a> 猫<0xFF>"):
        ids = tokenizer.encode(text)
        assert ids.tolist() == processor.encode(text)
        assert tokenizer.decode(ids) == text


def test_gpt2_equals_transformers_without_special_tokens(tmp_path):
    """Megatron's class splits a text only by GPT-2's regular expression."""
    transformers = pytest.importorskip("transformers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([TEXT * 3], trainer)
    vocab, merges = fast.model.save(str(tmp_path), "gpt2")
    theirs = transformers.GPT2Tokenizer(vocab=str(vocab), merges=str(merges))
    for given in ((vocab, merges), (vocab, None), (tmp_path, None)):
        ours = load_tokenizer("GPT2BPETokenizer", given[0], merge_file=given[1])
        assert (ours.vocab_size, ours.eod_id) == (fast.get_vocab_size(), 0)
        for text in (TEXT, "it's  1,234\n\n x", " a"):
            assert ours.encode(text).tolist() == fast.encode(text).ids
            assert ours.encode(text).tolist() == theirs(text).input_ids
            assert ours.decode(ours.encode(text)) == text
    assert 0 not in ours.encode("a<|endoftext|>b")
    with pytest.raises(UserError, match=r"--merge-file .*: no such file"):
        load_tokenizer("GPT2BPETokenizer", vocab, merge_file=tmp_path / "none.txt")


def test_byte_level_and_null_tokenizer():
    tokenizer = load_tokenizer("ByteLevelTokenizer", None)
    assert bytes(tokenizer.encode(TEXT).astype(np.uint8)) == TEXT.encode()
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod_id]) == TEXT
    null = load_tokenizer("NullTokenizer", None, vocab_size=500)
    assert (null.vocab_size, null.eod_id) == (501, 500)
    assert null.encode("1 2\n499").tolist() == [1, 2, 499]
    with pytest.raises(ValueError, match="outside"):
        null.encode("501")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("SentencePieceTokenizer", None, "does not exist"),
        ("SentencePieceTokenizer", b"version https://git-lfs", "not a readable SentencePiece"),
        ("Llama2Tokenizer", b"", "not a readable SentencePiece"),
        ("HuggingFaceTokenizer", None, "does not exist"),
        ("HuggingFaceTokenizer", b"{}", "not a readable tokenizer.json"),
        ("SentencepieceTokenizer", b"", "did you mean 'SentencePieceTokenizer'"),
        ("NullTokenizer", b"", "requires --vocab-size"),
    ],
)
def test_invalid_files_raise(kind, content, message, tmp_path):
    path = tmp_path / "file.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(kind, str(path))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_lone_surrogates_raise_value_error(kind, folder):
    tokenizer = load_tokenizer(kind, folder / "tokenizer.model" if "Sent" in kind else folder)
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode_batch(["a", "\ud800"])


def test_neither_torch_nor_transformers_is_imported(folder):
    code = (
        "import sys; from megatron_llmjp.tokenizers import load_tokenizer\n"
        f"load_tokenizer('HuggingFaceTokenizer', {str(folder)!r}).encode('a')\n"
        f"load_tokenizer('Llama2Tokenizer', {str(folder / 'tokenizer.model')!r}).encode('a')\n"
        "import data_tools.preprocess_data, megatron_llmjp.data.indexed_dataset\n"
        "print([m for m in ('torch', 'transformers', 'megatron.core') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vocabulary_with_gaps(tmp_path):
    """The vocabulary size is the largest id plus one, regardless of the number of tokens."""
    path = tmp_path / "tokenizer.json"
    write_words(path, {"<unk>": 0, "</s>": 1, "a": 2, "b": 70000})
    tokenizer = load_tokenizer("HuggingFaceTokenizer", path)
    assert tokenizer.vocab_size == 70001
    assert tokenizer.encode("a b").tolist() == [2, 70000]


def byte_level_bpe() -> tokenizers.Tokenizer:
    """Return a tokenizer whose template puts <s> before and </s> after a text."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(TEXT.splitlines(), trainer)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return fast


NEW = {"content": "<new>", "lstrip": True, "rstrip": True, "special": False}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split_special_tokens": True},
        {"additional_special_tokens": ["<x>"], "pad_token": "<pad>"},
        {"added_tokens_decoder": {"300": NEW | {"single_word": False, "normalized": False}}},
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
        {"add_bos_token": True, "bos_token": "<s>"},
    ],
)
def test_same_ids_as_auto_tokenizer(settings, tmp_path):
    """For all settings of tokenizer.json and tokenizer_config.json."""
    transformers = pytest.importorskip("transformers")
    fast = byte_level_bpe()
    fast.enable_truncation(3)
    fast.enable_padding(length=9, pad_id=2, pad_token="</s>")
    fast.save(str(tmp_path / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(common | settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    for text in (TEXT, "a b</s>c <x>yy <pad>", "the <new> token", "  a\n\n", ""):
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text).tolist() == expected
        assert ours.encode_batch([text, TEXT])[0].tolist() == expected
    ours.include_special_tokens()
    for text in (TEXT, "a b</s>c", ""):
        expected = theirs(text).input_ids
        assert ours.encode(text).tolist() == expected
        assert ours.encode_batch([TEXT, text])[1].tolist() == expected
