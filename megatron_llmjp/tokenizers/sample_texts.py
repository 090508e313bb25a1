"""Texts on which two tokenizers are compared where no corpus is at hand."""

from __future__ import annotations

TEXTS = (
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
"""Ordinary text: languages, numbers, code and markup."""

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
"""What tokenizers treat differently: spaces, bytes spelled out, emoji, combining characters."""
