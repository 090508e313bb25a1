"""Comparing the ids that two tokenizers give to the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.tokenizers.base import Ids, Tokenizer
from megatron_llmjp.tokenizers.sentencepiece import SentencePieceModel

DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """A text with the tokens of both tokenizers from the first different one on."""

    text: str
    token: int
    pieces: tuple[list[str], list[str]]

    def lines(self, names: Sequence[str]) -> list[str]:
        """Return the difference as readable lines."""
        found = [f"  differs at token {self.token} of {self.text[:40]!r}:"]
        width = max(map(len, names))
        pairs = zip(names, self.pieces, strict=True)
        return [*found, *(f"    {name:{width}} {pieces}" for name, pieces in pairs)]


@dataclass(frozen=True)
class Comparison:
    """How two tokenizers agree on some texts.

    Attributes:
        names: what the two are called in reports.
        texts, size, tokens: number of texts, their UTF-8 bytes, ids of the first tokenizer.
        differences: one for each text with different ids.
        broken: texts that the second tokenizer does not decode to themselves.
    """

    names: tuple[str, str]
    texts: int
    size: int
    tokens: int
    differences: tuple[Difference, ...]
    broken: int

    def report(self) -> str:
        """Return the counts and the first differences as lines of text."""
        first, second = self.names
        lines = [
            f"Compared on {self.texts:,} texts ({self.size:,} bytes, {self.tokens:,} tokens, "
            f"{self.size / max(self.tokens, 1):.2f} bytes per token): "
            f"{self.texts - len(self.differences):,} give the same ids in {first} and {second}, "
            f"{len(self.differences):,} differ; {self.broken:,} do not decode to the same text."
        ]
        for difference in self.differences[:DIFFERENCES_SHOWN]:
            lines += difference.lines(self.names)
        return "\n".join(lines)


def compare(
    first: Tokenizer,
    second: Tokenizer,
    texts: Sequence[str],
    names: tuple[str, str] = ("SentencePiece", "Hugging Face"),
) -> Comparison:
    """Encode texts with both tokenizers, without BOS, and return where their ids differ."""
    differences, tokens, broken = [], 0, 0
    for text, ours, theirs in zip(texts, _ids(first, texts), _ids(second, texts), strict=True):
        tokens += len(ours)
        broken += second.decode(theirs) != text
        if ours.tolist() != theirs.tolist():
            differences.append(_difference(text, (first, ours), (second, theirs)))
    size = sum(len(text.encode()) for text in texts)
    return Comparison(names, len(texts), size, tokens, tuple(differences), broken)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    encoded = tokenizer.encode_batch(texts)
    has_bos = isinstance(tokenizer, SentencePieceModel) and tokenizer.writes_bos
    return [ids[1:] for ids in encoded] if has_bos else encoded


def _difference(
    text: str, first: tuple[Tokenizer, Ids], second: tuple[Tokenizer, Ids]
) -> Difference:
    ours, theirs = first[1], second[1]
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    shown = ([tokenizer.piece(i) for i in ids[at : at + 8]] for tokenizer, ids in (first, second))
    return Difference(text, at, (next(shown), next(shown)))
