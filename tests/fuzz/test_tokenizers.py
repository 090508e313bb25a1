"""Fuzz tests of tokenizer files."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from data_tools.train_tokenizer import train_unigram
from megatron_llmjp.convert.formats.hugging_face.tokenizer import export_tokenizer
from megatron_llmjp.convert.model_tokenizer import open_tokenizer
from megatron_llmjp.tokenizers import load_tokenizer
from megatron_llmjp.tokenizers.registry import identity_key
from tests.support.fuzzing import Target, fuzz
from tests.support.fuzzing_mutators import HOSTILE, NUMBERS, mutated_bytes, mutated_json
from tests.support.tokenizer_files import TEXTS, byte_level_bpe, write_gpt2, write_tiktoken

EOD = "<|endoftext|>"


def use(kind: str, path: Path) -> None:
    """Load a tokenizer, and encode and decode texts."""
    tokenizer = load_tokenizer(kind, path)
    identity_key(tokenizer.identity())
    for ids in tokenizer.encode_batch([*TEXTS, EOD, "<s></s>"]):
        assert all(0 <= i < tokenizer.vocab_size for i in ids.tolist())
        tokenizer.decode(ids)
    tokenizer.piece(tokenizer.eod_id)


def write_sentencepiece(folder: Path) -> Path:
    path = folder / "tokenizer.model"
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=5)) for _ in range(300)]
    path.write_bytes(train_unigram([*(text for text in TEXTS if text), *words * 3], 400))
    return path


def read_sentencepiece(path: Path) -> None:
    for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        use(kind, path)


def mutated_model(content: bytes, generator: random.Random) -> bytes:
    """Change pieces, types and settings of a SentencePiece model."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    for _ in range(generator.choice((1, 2, 3))):
        change, piece = generator.randrange(9), generator.choice(model.pieces)
        number = generator.choice((-1, *NUMBERS[:9]))
        if change == 0:
            piece.piece = generator.choice(("", "▁", "a", "<s>", "\0", "x" * 5000, "\x7f<0x00>"))
        elif change == 1:
            piece.score = generator.choice((float("nan"), float("inf"), -1e30, 0.0))
        elif change == 2:
            piece.type = generator.randint(1, 6)
        elif change == 3:
            del model.pieces[generator.randint(1, len(model.pieces)) :]
        elif change == 4:
            model.pieces.add().CopyFrom(piece)
        elif change == 5:
            field = generator.choice(("unk_id", "bos_id", "eos_id", "pad_id"))
            setattr(model.trainer_spec, field, min(number, 2**31 - 1))
        elif change == 6:
            model.trainer_spec.model_type = generator.randint(1, 4)
        elif change == 7:
            size = generator.choice((0, 3, 4, 100))
            model.normalizer_spec.precompiled_charsmap = generator.randbytes(size)
        else:
            model.trainer_spec.byte_fallback = generator.random() < 0.5
    return model.SerializeToString()


def write_vocabulary(name: str, folder: Path) -> Path:
    write_gpt2(folder / "vocab.json", folder / "merges.txt")
    return folder / name


def read_gpt2(path: Path) -> None:
    use("GPT2BPETokenizer", path.with_name("vocab.json"))


def write_fast(name: str, folder: Path) -> Path:
    byte_level_bpe((EOD, "<s>", "</s>")).save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": EOD, "lstrip": False, "special": True},
        "pad_token": None,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {"0": {"content": EOD, "special": True, "rstrip": False}},
        "additional_special_tokens": ["<x>", {"content": "<y>"}],
        "extra_special_tokens": {"image": "<z>"},
    }
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / other).write_text(json.dumps(settings))
    return folder / name


def read_fast(path: Path) -> None:
    use("HuggingFaceTokenizer", path.parent)


def export_fast(path: Path) -> None:
    """Export a tokenizer with another end-of-document token, which rewrites its settings."""
    chosen = open_tokenizer(path.parent, None, None)
    export_tokenizer(chosen, False, 400)


def write_tokens(folder: Path) -> Path:
    return write_tiktoken(folder / "vocab.json", 300)


def read_tiktoken(path: Path) -> None:
    from megatron_llmjp.tokenizers.base import TikTokenSettings

    tokenizer = load_tokenizer("TikTokenizer", path, tiktoken=TikTokenSettings("v2", 10))
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))


def as_other_type(path: Path) -> None:
    """Load a file as every type that it does not have, for the hints in the messages."""
    use("HuggingFaceTokenizer", path)


def of_other_types(valid: bytes) -> list[bytes]:
    return [valid, *HOSTILE, b'{"a": 1}', b'[{"token_bytes": 1}]', b'{"model": {}}', b'{"a": "b"}']


JSON = (mutated_json, mutated_json, mutated_bytes)

TARGETS = {
    "SentencePiece": Target(
        write_sentencepiece, read_sentencepiece, (mutated_model, mutated_bytes), examples=150
    ),
    "vocab.json": Target(
        partial(write_vocabulary, "vocab.json"),
        read_gpt2,
        JSON,
        examples=80,
        names=r"vocab\.json|merges\.txt",
    ),
    "merges.txt": Target(partial(write_vocabulary, "merges.txt"), read_gpt2, examples=80),
    "tokenizer.json": Target(partial(write_fast, "tokenizer.json"), read_fast, JSON, examples=120),
    "tokenizer_config.json": Target(
        partial(write_fast, "tokenizer_config.json"),
        read_fast,
        JSON,
        names=r"tokenizer_config|tokenizer\.json",
    ),
    "special_tokens_map.json": Target(
        partial(write_fast, "special_tokens_map.json"),
        read_fast,
        JSON,
        examples=60,
        names=r"special_tokens_map|tokenizer_config|tokenizer\.json",
    ),
    "tiktoken": Target(write_tokens, read_tiktoken, JSON, examples=120),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
