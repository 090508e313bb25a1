"""Fast tokenizers built from SentencePiece models give the ids of SentencePiece."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_llmjp.tokenizers import load_tokenizer
from megatron_llmjp.tokenizers.comparison import COMMON_TEXTS, RARE_TEXTS, compare_tokenizers
from megatron_llmjp.tokenizers.sentencepiece import SENTENCEPIECE_CLASSES, load_sentencepiece
from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face, model_specific_texts

LLAMA2 = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
}  # fmt: skip
"""Training settings of Llama-2's model."""
LLM_JP = {**LLAMA2, "model_type": "unigram", "control_symbols": ["<mask>", "<EOD>"]}
NFKC = {"model_type": "unigram", "add_dummy_prefix": False}
"""SentencePiece's defaults (NFKC, repeated spaces are merged), without a dummy prefix."""


def train(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in COMMON_TEXTS * 3 for line in text.split("\n") if line),
        model_writer=model, vocab_size=560, hard_vocab_limit=False, character_coverage=0.98,
        minloglevel=2, num_threads=1, **settings,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("settings", [LLAMA2, LLM_JP, NFKC], ids=["bpe", "unigram", "nfkc"])
@pytest.mark.parametrize("kind", SENTENCEPIECE_CLASSES)
def test_auto_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, kind, settings):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "any.model"
    path.write_bytes(train(**settings))
    export_hugging_face(load_sentencepiece(kind, path), tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    # SentencePiece's NFKC composes characters across the entries of its table.
    texts = [
        text
        for text in (*COMMON_TEXTS, *RARE_TEXTS)
        if settings is not NFKC or "\u3099" not in text
    ]
    for text in texts:
        assert fast(text, add_special_tokens=False).input_ids == plain.encode(text), text
    bos = [plain.bos_id()] if kind == "Llama2Tokenizer" else []
    assert fast("text").input_ids == [*bos, *plain.encode("text")]
    eod = "<EOD>" if kind == "SentencePieceTokenizer" and settings is LLM_JP else "</s>"
    assert (fast.eos_token, fast.eos_token_id) == (eod, plain.piece_to_id(eod))
    assert fast.bos_token_id == plain.bos_id()
    if settings is not NFKC:
        ids = fast("  日本の\n\n\tx").input_ids
        assert fast.decode(ids, skip_special_tokens=True) == "  日本の\n\n\tx"


def test_special_tokens_added_by_megatron(tmp_path):
    """LLM-jp's v2.1 model has <mask>; SentencePieceTokenizer adds <MASK> after its pieces."""
    path = tmp_path / "any.model"
    path.write_bytes(train(**LLM_JP))
    tokenizer = load_sentencepiece("SentencePieceTokenizer", path)
    export_hugging_face(tokenizer, tmp_path)
    fast = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    assert fast.vocab_size == tokenizer.vocab_size > tokenizer.processor.get_piece_size()
    text = "a<CLS>b<EOD> c<MASK>\n</s>"
    assert fast.encode(text).tolist() == tokenizer.encode(text).tolist()
    export_hugging_face(tokenizer, tmp_path, model_vocab_size=tokenizer.processor.get_piece_size())
    fast = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    assert fast.vocab_size == tokenizer.processor.get_piece_size()


def test_user_defined_and_unused_pieces(tmp_path):
    """SentencePiece always matches user-defined pieces and never returns unused ones."""
    model = sentencepiece_model_pb2.ModelProto.FromString(
        train(**LLM_JP, user_defined_symbols=["<tool>", "猫で"])
    )
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    used = plain.encode(COMMON_TEXTS[0], out_type=str)
    longest = max(used, key=len)
    model.pieces[plain.piece_to_id(longest)].type = 5  # unused
    (tmp_path / "any.model").write_bytes(model.SerializeToString())
    tokenizer = load_sentencepiece("Llama2Tokenizer", tmp_path / "any.model")
    export_hugging_face(tokenizer, tmp_path)
    fast = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    texts = model_specific_texts(tokenizer)
    assert texts == ["a<tool>b <tool>\n<tool>", "a猫でb 猫で\n猫で"]
    assert not compare_tokenizers(tokenizer, fast, [*COMMON_TEXTS, *texts]).differences
    assert longest not in [fast.piece(i) for i in fast.encode(COMMON_TEXTS[0])]


def test_differences_are_reported_with_their_position(tmp_path):
    for name, settings in (("first", LLAMA2), ("second", LLM_JP)):
        (tmp_path / name).write_bytes(train(**settings))
    first, second = (
        load_sentencepiece("Llama2Tokenizer", tmp_path / n) for n in ("first", "second")
    )
    assert not compare_tokenizers(first, first, COMMON_TEXTS).differences
    found = compare_tokenizers(first, second, COMMON_TEXTS, ("the first", "the second"))
    assert found.differences and "differs at token" in found.report()
    assert "the second " in found.report()
