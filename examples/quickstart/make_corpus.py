"""Corpus of the quickstart: Japanese and English texts of this folder, and Python's library.

    python examples/quickstart/make_corpus.py --output-dir quickstart_output/corpus

Writes ja.jsonl, en.jsonl and code.jsonl, and a valid_*.jsonl of each with every 20th document.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TEXTS = Path(__file__).parent / "corpus"
CODE_BYTES = 2_500_000
ENGLISH_BYTES = 700_000
VALIDATION_EVERY = 20


def main() -> int:
    """Write all files and print their sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for language, documents in {
        "ja": list(own_texts("ja")),
        "en": [*own_texts("en"), *capped(docstrings(), ENGLISH_BYTES)],
        "code": list(capped(sources(), CODE_BYTES)),
    }.items():
        held_out = documents[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
        kept = [d for i, d in enumerate(documents, start=1) if i % VALIDATION_EVERY]
        write(folder / f"{language}.jsonl", kept)
        write(folder / f"valid_{language}.jsonl", held_out)
    return 0


def own_texts(language: str) -> Iterator[str]:
    """Yield the texts of this folder."""
    for line in (TEXTS / f"{language}.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        yield f"{document['title']}\n{document['text']}"


def library_files() -> list[Path]:
    """Return the modules of Python's standard library in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    return [p for p in sorted(library.rglob("*.py")) if not skipped & set(p.parts)]


def sources() -> Iterator[str]:
    """Yield source files of moderate length."""
    for path in library_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if 500 < len(text) < 60_000 and "encodings" not in path.parts:
            yield text


def docstrings() -> Iterator[str]:
    """Yield the English docstrings of the standard library, joined by module."""
    for path in library_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        text = "\n\n".join(t for t in texts if t and len(t) > 60)
        if len(text) > 300:
            yield text


def capped(texts: Iterator[str], size: int) -> Iterator[str]:
    """Yield texts until ``size`` bytes are reached."""
    for text in texts:
        size -= len(text.encode())
        if size < 0:
            return
        yield text


def write(path: Path, documents: list[str]) -> None:
    """Write one JSON object per line."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(documents)} documents, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    raise SystemExit(main())
