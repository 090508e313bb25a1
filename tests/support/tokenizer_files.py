"""Small vocabularies in the formats of Megatron-LM's tokenizers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import tokenizers

TEXTS = (
    "吾輩は猫である。名前はまだ無い。\nHello,  world! def main():\n        return 42 🐈\n",
    "it's  1,234\n\n x\r\n\tfooBar BAZ /path/to\n",
    " a",
    "",
    "\u3000全角　空白 Ünïcode ǅ",
)


def byte_level_bpe(special_tokens: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on the texts."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([text * 3 for text in TEXTS], trainer)
    return fast


def write_gpt2(vocab: Path, merges: Path) -> tuple[Path, Path]:
    """Write the two files of GPT2BPETokenizer."""
    written_vocab, written_merges = byte_level_bpe(("<|endoftext|>",)).model.save(str(vocab.parent))
    return Path(written_vocab).rename(vocab), Path(written_merges).rename(merges)


def tiktoken_entries(number: int) -> list[dict[str, object]]:
    """Return TikTokenizer entries: the 256 bytes and learned tokens."""
    fast = byte_level_bpe()
    by_id = sorted(fast.get_vocab().items(), key=lambda pair: pair[1])
    learned = [fast.decoder.decode([piece]).encode() for piece, _ in by_id]
    longer = [token for token in learned if len(token) > 1 and b"\xef\xbf\xbd" not in token]
    tokens = [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(longer)][:number]
    return [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate(tokens)
    ]


def write_tiktoken(path: Path, number: int) -> Path:
    """Write the file of TikTokenizer."""
    path.write_text(json.dumps(tiktoken_entries(number)))
    return path
