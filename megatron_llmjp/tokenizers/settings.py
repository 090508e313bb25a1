"""Settings of tokenizers that their files do not hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TikTokenSettings:
    """What the flags ``--tiktoken-*`` say of a vocabulary.

    Attributes:
        pattern: ``v1`` or ``v2``, the regular expression that cuts a text before merging.
        num_special_tokens: ids before the vocabulary; those without a name are ``<SPECIAL_n>``.
        special_tokens: names of the first ids; ``<unk> <s> </s>`` where none are given.
    """

    pattern: str = "v2"
    num_special_tokens: int = 1000
    special_tokens: tuple[str, ...] = ()
