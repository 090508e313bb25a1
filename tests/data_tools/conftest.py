"""A small real corpus and a tokenizer trained on it, once per test session."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_tools.train_tokenizer import train_unigram
from megatron_llmjp.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face

JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。",
    "親譲りの無鉄砲で小供の時から損ばかりしている。",
    "山路を登りながら、こう考えた。智に働けば角が立つ。情に棹させば流される。",
)


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Return documents of Japanese sentences, English and code, of very different lengths."""
    draw = random.Random(seed)
    code = Path(json.__file__).read_text(encoding="utf-8").splitlines()
    documents = []
    for _ in range(count):
        lines = [draw.choice([*JAPANESE, draw.choice(code)]) for _ in range(draw.randint(1, 12))]
        documents.append("\n".join(lines))
    return documents


def write_jsonl(path: Path, documents: list[str], key: str = "text") -> Path:
    """Write documents as JSON lines, half of them with escapes instead of UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for at, text in enumerate(documents):
            file.write(json.dumps({key: text, "n": at}, ensure_ascii=at % 2 == 0) + "\n")
    return path


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_unigram(documents, 700))
    export_hugging_face(SentencePieceTokenizer(folder / "tokenizer.model"), folder)
    return folder


@pytest.fixture(scope="session")
def model(tokenizer_folder: Path) -> Path:
    return tokenizer_folder / "tokenizer.model"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents)
