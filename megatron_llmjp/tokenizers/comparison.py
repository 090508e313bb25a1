"""Comparison of two tokenizers by the ids they give for the same texts, and texts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.tokenizers.base import Ids, Tokenizer
from megatron_llmjp.tokenizers.sentencepiece import SentencePieceModel

COMMON_TEXTS = (
    "The quick brown fox jumps over the lazy dog. It was 7:45 p.m., and nobody noticed.",
    "In 1984, 3.14159 people out of 1,000,000 paid $12.50 (about 1,900 yen) for the book.",
    "We're sure they've said: “it isn't the end” — but what's next? Don't ask!",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "東京都千代田区一ツ橋2-1-2、電話03-4212-2000。受付は平日の9時〜17時です。",
    "自然言語処理では、単語の分割が難しい。カタカナ語(トークナイザー)やＡＢＣ１２３もある。",
    "今日はDeep Learningの勉強会で、LLMのpretrainingについて20分話しました。",
    "　全角の空白で始まる段落。\n「会話」も、…も、ーも、〜も含む。\n\n次の段落。",
    "人工智能是计算机科学的一个分支。这是一个测试句子。",
    "안녕하세요, 오늘 날씨가 좋네요.",
    "Größe, façade, naïve, señor, Ωμέγα, Привет, мир!",
    "def f(x: int) -> int:\n    if x == 0:\n        return 1  # base\n\treturn x * f(x - 1)\n",
    '#include <stdio.h>\nint main(void) {\n  printf("%d\\n", 0x1F);\n  return 0;\n}\n',
    '{"key": [1, 2.5, null], "url": "https://example.org/a_b?c=d&e=%20"}',
    "| a | b |\n|---|---|\n| 1 | **two** |\n\n- item\n  - nested\n\n$\\sum_{i=1}^{n} x_i^2$",
    "SELECT name, COUNT(*) FROM users WHERE id >= 10 GROUP BY name;",
)
"""Common texts: languages, numbers, code and markup."""

RARE_TEXTS = (
    "",
    " ",
    "   three spaces before, two  inside, one after ",
    "\n\n\n",
    "line\r\nanother\tand a tab\t\t",
    "<0x0A>",
    "a<0x41> <0x",
    "<0x<0xE3>0A>\n",
    "😀👍🏽 family: 👨‍👩‍👧‍👦, flag: 🇯🇵",
    "𠮷野家で𩸽を食べる。葛󠄀城市",
    "か\u3099き\u3099 e\u0301 ﬁ ㍿ ①",
    "▁underscore▁ of SentencePiece",
    "zero\u200bwidth, soft\u00adhyphen, no\u00a0break, \ufeffmark",
    "\x00\x1f\x7f",
)
"""Texts that tokenizers often treat differently: spaces, literal bytes, emoji, combining marks."""


DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class TokenDifference:
    """A text with different tokens, and the tokens from the first difference on."""

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
class TokenizerComparison:
    """Result of comparing two tokenizers on a list of texts.

    Attributes:
        names: names of the tokenizers in the report.
        texts, size, tokens: number of texts, their UTF-8 bytes, ids of the first tokenizer.
        differences: one for each text with different ids.
        broken: number of texts that the second tokenizer does not decode to the same text.
    """

    names: tuple[str, str]
    texts: int
    size: int
    tokens: int
    differences: tuple[TokenDifference, ...]
    broken: int

    def report(self) -> str:
        """Return the counts and the first differences as text."""
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


def compare_tokenizers(
    first: Tokenizer,
    second: Tokenizer,
    texts: Sequence[str],
    names: tuple[str, str] = ("SentencePiece", "Hugging Face"),
) -> TokenizerComparison:
    """Encode texts with both tokenizers, without BOS, and compare the ids."""
    differences, tokens, broken = [], 0, 0
    for text, ours, theirs in zip(texts, _ids(first, texts), _ids(second, texts), strict=True):
        tokens += len(ours)
        broken += second.decode(theirs) != text
        if ours.tolist() != theirs.tolist():
            differences.append(_difference(text, (first, ours), (second, theirs)))
    size = sum(len(text.encode()) for text in texts)
    return TokenizerComparison(names, len(texts), size, tokens, tuple(differences), broken)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    encoded = tokenizer.encode_batch(texts)
    has_bos = isinstance(tokenizer, SentencePieceModel) and tokenizer.writes_bos
    return [ids[1:] for ids in encoded] if has_bos else encoded


def _difference(
    text: str, first: tuple[Tokenizer, Ids], second: tuple[Tokenizer, Ids]
) -> TokenDifference:
    ours, theirs = first[1], second[1]
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    shown = ([tokenizer.piece(i) for i in ids[at : at + 8]] for tokenizer, ids in (first, second))
    return TokenDifference(text, at, (next(shown), next(shown)))
