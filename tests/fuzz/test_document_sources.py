"""Fuzz tests of files of document sources."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from data_tools import preprocess_data
from data_tools.document_sources.lookup import SourceLookup, format_origin
from data_tools.document_sources.original_lines import read_original_lines
from megatron_llmjp.data.indexed_dataset import read_index
from tests.support.fuzzing import Target, fuzz, run_main
from tests.support.fuzzing_mutators import NUMBERS, mutated_bytes, mutated_json

TRAILER = struct.Struct("<QQQ8s")
"""Documents, offset of the table of blocks, bytes of the list of files, magic number."""


def write_sources(folder: Path) -> Path:
    lines = [json.dumps({"text": "吾輩は猫である。", "id": f"文書{n}"}) for n in range(40)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    run_main(preprocess_data.main, "--input", folder / "c.jsonl", "--output-prefix", folder / "o",
             "--tokenizer-type", "ByteLevelTokenizer", "--workers", "1", "--record-sources",
             "--id-key", "id")  # fmt: skip
    return folder / "o_text_document.sources"


def read_sources(path: Path) -> None:
    """Look up all documents by number and by id, and read their lines."""
    lookup, prefix = SourceLookup(), str(path.with_suffix(""))
    origins = [lookup.origin(prefix, n) for n in range(read_index(prefix).documents)]
    known = [origin for origin in origins if origin is not None]
    assert all(format_origin(origin) and origin.to_json() for origin in known)
    assert len(read_original_lines(known)) == len(origins)
    list(lookup.find_id(prefix, "文書7"))


def mutated_parts(content: bytes, generator: random.Random) -> bytes:
    """Change the list of files, or a field of a block, of the table of blocks or the trailer."""
    documents, table, size, magic = TRAILER.unpack(content[-TRAILER.size :])
    head, text = content[: -TRAILER.size - size], content[-TRAILER.size - size : -TRAILER.size]
    fields = [documents, table, size]
    if generator.random() < 0.4:
        text = mutated_json(text, generator)
        fields[2] = len(text)
    elif generator.random() < 0.3:
        fields[generator.randrange(3)] = generator.choice((*NUMBERS, documents, table)) % 2**64
    else:
        body = bytearray(head)
        at, width = generator.randrange(8, len(body) - 8), generator.choice((1, 8))
        body[at : at + width] = (generator.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        head = bytes(body)
    return head + text + TRAILER.pack(*fields, magic)


TARGETS = {
    "sources": Target(
        write_sources,
        read_sources,
        (mutated_parts, mutated_parts, mutated_bytes),
        examples=150,
        names="o_text_document.sources",
    )
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
