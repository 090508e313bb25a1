"""Conversion of TikTokenizer vocabularies to Hugging Face fast tokenizers.

Follows transformers' TikTokenConverter (convert_slow_tokenizer.py), with ids after the special
tokens.
"""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_llmjp.tokenizers.tiktoken import PATTERNS, TikTokenizer


def build_fast_tiktoken(tokenizer: TikTokenizer) -> tokenizers.Tokenizer:
    """Return the fast tokenizer of a vocabulary, with its tokens, merges and pattern."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    letters = _byte_characters()
    spelled = ["".join(letters[byte] for byte in token) for token in tokenizer.tokens]
    first = len(tokenizer.special_names)
    vocabulary = {name: at for at, name in enumerate(tokenizer.special_names)}
    vocabulary |= {text: first + rank for rank, text in enumerate(spelled)}
    merges = []
    for rank, token in enumerate(tokenizer.tokens):
        cuts = [at for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
        cuts.sort(key=lambda at: (ranks[token[:at]], ranks[token[at:]]))
        merges += [(spelled[rank][:at], spelled[rank][at:]) for at in cuts]
    fast = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    names = [tokenizers.AddedToken(name, special=True) for name in tokenizer.special_names]
    fast.add_special_tokens(names)
    pattern = tokenizers.Regex(PATTERNS[tokenizer.settings.pattern])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    return fast


def _byte_characters() -> list[str]:
    """Return the character that represents each byte in GPT-2's byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
