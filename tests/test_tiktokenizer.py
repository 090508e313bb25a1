"""TikTokenizer compared with megatron-core's class and the tiktoken library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import load_tokenizer
from megatron_llmjp.tokenizers.base import TikTokenSettings
from megatron_llmjp.tokenizers.registry import describe_identity, identity_key
from tests.support.tokenizer_files import TEXTS, tiktoken_entries, write_tiktoken


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "vocab.json", 300)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
@pytest.mark.parametrize(("special", "size"), [(1000, 1300), (10, 290)])
def test_ids_equal_megatron_core(pattern, special, size, vocabulary):
    """Both truncate the file to the vocabulary size, which includes special tokens."""
    library = pytest.importorskip("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
    theirs = library.TikTokenTokenizer(
        str(vocabulary), num_special_tokens=special, pattern=pattern, vocab_size=size
    )
    settings = TikTokenSettings(pattern, special, tuple(library.SPECIAL_TOKENS))
    ours = load_tokenizer("TikTokenizer", vocabulary, vocab_size=size, tiktoken=settings)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.text_to_ids(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.eod_id, ours.bos_id, ours.pad_id) == (
        theirs.vocab_size,
        theirs.eod,
        theirs.bos_id,
        theirs.pad_id,
    )
    assert [ours.piece(i) for i in range(size)] == [theirs.id_to_token(i) for i in range(size)]


def test_special_tokens_in_a_text_are_text(vocabulary):
    """As in Megatron-LM's class of core 0.12; core 0.16 recognizes them."""
    ours = load_tokenizer("TikTokenizer", vocabulary)
    assert (ours.vocab_size, ours.eod_id, ours.bos_id) == (1300, 2, 1)
    assert min(ours.encode("a</s><SPECIAL_3>")) >= 1000
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode("a\ud800")
    with pytest.raises(ValueError, match="consecutive spaces"):
        ours.encode("x" + " \t" * 500_000 + "x")


def test_identity_covers_all_settings(vocabulary):
    changed = [
        TikTokenSettings("v1"),
        TikTokenSettings(num_special_tokens=100),
        TikTokenSettings(special_tokens=("<s>", "</s>", "<unk>")),
    ]
    plain = load_tokenizer("TikTokenizer", vocabulary).identity()
    spelled_out = TikTokenSettings(special_tokens=("<unk>", "<s>", "</s>"))
    same = load_tokenizer("TikTokenizer", vocabulary, tiktoken=spelled_out, vocab_size=1300)
    assert identity_key(same.identity()) == identity_key(plain)
    for settings in changed:
        other = load_tokenizer("TikTokenizer", vocabulary, tiktoken=settings).identity()
        assert identity_key(other) != identity_key(plain)
        assert describe_identity(other) != describe_identity(plain)
    smaller = load_tokenizer("TikTokenizer", vocabulary, vocab_size=1299).identity()
    assert identity_key(smaller) != identity_key(plain)


GOOD = tiktoken_entries(260)
WRONG = {
    "no JSON": (b"YQ== 0\nYg== 1\n", "not a readable TikTokenizer vocabulary"),
    "a tokenizer.json": (b'{"model": {}}', "--tokenizer-type HuggingFaceTokenizer"),
    "other keys": ([*GOOD, {"rank": 260}], "entry 260 is {'rank': 260}"),
    "no entry": ([*GOOD, "x"], "entry 260 is x"),
    "a wrong rank": ([*GOOD, GOOD[1]], "entry 260 has rank 1"),
    "no base64": ([*GOOD, GOOD[1] | {"rank": 260, "token_bytes": "*"}], "not base64"),
    "no text": ([*GOOD, GOOD[1] | {"rank": 260, "token_bytes": 5}], "not base64"),
    "twice": ([*GOOD, GOOD[7] | {"rank": 260}], "entry 260 has the same bytes as entry 7"),
    "no bytes": ([*GOOD[:9], GOOD[9] | {"token_bytes": "YQ=="}], "first 256 entries must be"),
    "too short": (GOOD[:200], "exceed a vocabulary of 1200"),
}


@pytest.mark.parametrize("content", WRONG)
def test_damaged_vocabularies_raise(content, tmp_path):
    written, message = WRONG[content]
    path = tmp_path / "vocab.json"
    path.write_bytes(written if isinstance(written, bytes) else json.dumps(written).encode())
    with pytest.raises(UserError) as error:
        load_tokenizer("TikTokenizer", path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (TikTokenSettings("v3"), None, "--tiktoken-pattern v3: expected v1 or v2"),
        (TikTokenSettings(special_tokens=("<s>",)), None, "<unk> </s> must be included"),
        (TikTokenSettings(num_special_tokens=2), None, "num-special-tokens 2: 3 are given"),
        (
            TikTokenSettings(special_tokens=("<unk>", "<s>", "</s>", "<s>")),
            None,
            "<s> is given twice",
        ),
        (TikTokenSettings(), 2000, "--vocab-size 2000: .* has 300 tokens, with 1000 special"),
        (TikTokenSettings(), 1200, "exceed a vocabulary of 1200"),
    ],
)
def test_invalid_settings_raise(settings, size, message, vocabulary):
    with pytest.raises(UserError, match=message):
        load_tokenizer("TikTokenizer", vocabulary, vocab_size=size, tiktoken=settings)
    for path, words in ((vocabulary.parent, "is a directory"), ("none.json", "does not exist")):
        with pytest.raises(UserError, match=words):
            load_tokenizer("TikTokenizer", path)
