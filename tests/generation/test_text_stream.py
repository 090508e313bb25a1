"""Incremental detokenization, compared with the text that was encoded."""

from __future__ import annotations

import io

import pytest
import sentencepiece
import tokenizers

from megatron_llmjp.generation.text_stream import REPLACEMENT, TextStream
from megatron_llmjp.tokenizers import load_tokenizer
from tests.support.tokenizer_files import write_gpt2, write_tiktoken

PROMPT = "吾輩は猫である。 Once upon"
TEXT = " a time 🐈‍⬛🇯🇵, 名前はまだ無い。\n\n  def f(): é\u0301 𠮷野家 " + "いろは🐈" * 20 + " end."


def sentencepiece_model(folder):
    """A model with byte fallback, which encodes most of the text as bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["吾輩は猫である。", "Once upon a time", "def f():", "end."] * 20),
        model_writer=model,
        vocab_size=310,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / "tok.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer("GPTSentencePieceTokenizer", path)


def byte_fallback_json(folder):
    """The same kind of vocabulary for the tokenizers library, whose decoder joins runs of bytes."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    pieces += [("▁", -3.0), ("▁Once", -2.0), ("▁a", -2.0), ("猫", -2.0), ("い", -2.0), ("e", -3.0)]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, byte_fallback=True))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["</s>"])
    fast.save(str(folder / "tokenizer.json"))
    return load_tokenizer("HuggingFaceTokenizer", folder / "tokenizer.json")


TOKENIZERS = {
    "sentencepiece": sentencepiece_model,
    "byte fallback": byte_fallback_json,
    "gpt2": lambda folder: load_tokenizer(
        "GPT2BPETokenizer", *write_gpt2(folder / "vocab.json", folder / "merges.txt")[:1],
        merge_file=folder / "merges.txt",
    ),
    "tiktoken": lambda folder: load_tokenizer(
        "TikTokenizer", write_tiktoken(folder / "tok.json", 300), vocab_size=1300
    ),
    "bytes": lambda folder: load_tokenizer("ByteLevelTokenizer", None),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_are_whole_characters_and_join_to_the_text(name, tmp_path):
    tokenizer = TOKENIZERS[name](tmp_path)
    ids, prompt = tokenizer.encode(PROMPT + TEXT).tolist(), tokenizer.encode(PROMPT).tolist()
    assert ids[: len(prompt)] == prompt, "choose a prompt that ends at a token"
    stream = TextStream(tokenizer, prompt)
    parts = [stream.add(i) for i in ids[len(prompt) :]]
    assert REPLACEMENT not in "".join(parts)
    assert "".join(parts) == TEXT
    assert stream.finish() == ""
    assert sum(map(bool, parts)) > len(TEXT) / 4  # in many parts, not at the end


def test_bytes_that_are_no_character_are_written_at_the_end():
    tokenizer = load_tokenizer("ByteLevelTokenizer", None)
    stream = TextStream(tokenizer, [97])
    assert [stream.add(i) for i in (0xE3, 0x81)] == ["", ""]
    assert stream.finish() == REPLACEMENT
    stream = TextStream(tokenizer, [97])
    assert "".join(stream.add(i) for i in (0xE3, 98)) == REPLACEMENT + "b"
