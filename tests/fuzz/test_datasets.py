"""Fuzz tests of datasets: indices, tokens, manifests, caches, and the input of preprocess_data."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lz4.frame
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_tools import inspect_dataset, merge_datasets, preprocess_data
from data_tools.documents import chunks_with_tokens, document_chunks
from data_tools.preprocess.encoding.encode import BlockEncoder, EncodingOptions
from data_tools.preprocess.input.blocks import LongLine, read_blocks
from data_tools.preprocess.input.sources import find_input
from megatron_llmjp.data.dataset_tokenizers import mixed_tokenizer_warnings
from megatron_llmjp.data.folds.datasets import (
    compute_keys,
    files_stamp,
    inspect_datasets,
    largest_id,
    load_facts,
    save_facts,
)
from megatron_llmjp.data.folds.schema import BlendEntry, Fold, FoldFile
from megatron_llmjp.data.indexed_dataset import HEADER, read_and_check_index
from megatron_llmjp.data.indices.index_cache import atomic_folder, ensure_index, find_damage
from megatron_llmjp.tokenizers import load_tokenizer
from tests.support.datasets import write_dataset
from tests.support.fuzzing import Target, fuzz, run_main
from tests.support.fuzzing_mutators import (
    HOSTILE,
    NUMBERS,
    mutated_bytes,
    mutated_json,
    mutated_json_lines,
)

LINES = b"".join(
    json.dumps({"text": "吾輩は猫である。 " * n, "meta": {"n": n}}).encode() + b"\n"
    for n in range(12)
)
KEYS = ["text"]
LIMIT = 1_000_000
"""Longest line in bytes."""
BYTES = ("--tokenizer-type", "ByteLevelTokenizer", "--workers", "1", "--max-line-mb", "1")


def write_index(folder: Path) -> Path:
    write_dataset(folder / "d", 30, seed=1)
    return folder / "d.idx"


def write_tokens(folder: Path) -> Path:
    return write_index(folder).with_suffix(".bin")


def read_dataset(path: Path) -> None:
    prefix = path.with_suffix("")
    index = read_and_check_index(prefix)
    count = 0
    for chunk in document_chunks(index):
        for tokens, _ in chunks_with_tokens(index, chunk):
            count += len(tokens)
    assert count == index.tokens
    largest_id(index)
    compute_keys(str(prefix))


def mutated_index(content: bytes, generator: random.Random) -> bytes:
    """Change fields of the header, lengths, pointers or documents of an index."""
    _, version, code, sequences, entries = HEADER.unpack(content[: HEADER.size])
    fields = [version, code, sequences, entries]
    body = bytearray(content[HEADER.size :])
    for _ in range(generator.choice((1, 1, 2))):
        number = generator.choice((*NUMBERS, sequences, entries, generator.randrange(100)))
        if generator.random() < 0.4:
            at = generator.randrange(4)
            fields[at] = number % (256 if at == 1 else 2**64)
        else:
            size, first, count = generator.choice(
                ((4, 0, sequences), (8, 4 * sequences, sequences), (8, 12 * sequences, entries))
            )
            at = first + size * generator.randrange(count)
            body[at : at + size] = (number % 256**size).to_bytes(size, "little")
    return HEADER.pack(content[:9], *fields) + bytes(body)


def preprocess(folder: Path, *words: str) -> Path:
    (folder / "c.jsonl").write_bytes(LINES)
    run_main(preprocess_data.main, "--input", folder / "c.jsonl", "--output-prefix",
             folder / "o", *BYTES, *words)  # fmt: skip
    return folder / "o_text_document.json"


def read_manifest(path: Path) -> None:
    """Read a manifest in every program that does."""
    prefix = path.with_suffix("")
    mixed_tokenizer_warnings([str(prefix)])
    compute_keys(str(prefix))
    run_main(inspect_dataset.main, prefix, "--json")
    run_main(inspect_dataset.main, "--summary", prefix, "--report", path.with_name("card.md"))
    with contextlib.redirect_stdout(io.StringIO()):  # its exit code 1 is a found difference
        inspect_dataset.verify_all([str(prefix)], None)
    merged = path.with_name("merged")
    words = ("--input", prefix, prefix, "--output-prefix", merged, "--overwrite")
    run_main(merge_datasets.main, *words)
    run_main(preprocess_data.main, "--input", path.with_name("c.jsonl"), "--output-prefix",
             path.with_name("o"), *BYTES)  # fmt: skip


def make_facts(folder: Path) -> Path:
    write_index(folder)
    blend = {"d": BlendEntry(path=str(folder / "d"), weight=1)}
    file = FoldFile(folds=(Fold(name="f", samples=4, blend=blend),))
    save_facts(inspect_datasets(file), folder)
    return next((folder / "facts").iterdir())


def read_facts(path: Path) -> None:
    prefix = str(path.parents[1] / "d")
    found = load_facts(path.stem, (), path.parents[1])
    assert path.stem == files_stamp(prefix)
    if found is not None:
        assert isinstance(found.tokens, int) and isinstance(found.key, str)


def build_cache(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(100))


def make_cache(name: str, folder: Path) -> Path:
    with atomic_folder(folder / "index") as temporary:
        build_cache(temporary)
    return folder / "index" / name


def read_cache(path: Path) -> None:
    find_damage(path.parent, thorough=True)
    ensure_index(path.parent, build_cache)
    assert find_damage(path.parent, thorough=False) is None


def mutated_array_header(content: bytes, generator: random.Random) -> bytes:
    """Change the header of a .npy file, keeping its length."""
    header, rest = content[10:128], content[128:]
    text = header.decode().rstrip()
    shape = generator.choice(("(2**60,)", "(10**40,)", "(-1,)", "()", "(100, 0)", "(1.5,)", "None",
                              "(" * 200 + ")" * 200, "(" + "1," * 30 + ")"))  # fmt: skip
    kind = generator.choice(("'|O'", "'<i8'", "'<M8[s]'", "[('a', '<i8')]", "'V0'", "'S0'", "3"))
    text = text.replace("(100,)", shape).replace("'<i8'", kind)
    return content[:8] + struct.pack("<H", len(text)) + text.encode() + rest


def make_journal(folder: Path) -> Path:
    """Leave an unfinished run, whose last line is invalid."""
    (folder / "c.jsonl").write_bytes(LINES + b"bad\n")
    try:
        run_preprocessing(folder)
    except Exception as error:
        assert "not valid JSON" in str(error), error
    return folder / "o.partial" / "journal.jsonl"


def run_preprocessing(folder: Path) -> None:
    run_main(preprocess_data.main, "--input", folder / "c.jsonl", "--output-prefix",
             folder / "o", *BYTES)  # fmt: skip


def resume_journal(path: Path) -> None:
    content = path.read_bytes() if path.is_file() else None
    for file in path.parents[1].glob("o_*"):
        file.unlink()
    source = path.parents[1] / "c.jsonl"
    try:
        run_preprocessing(path.parents[1])
    except Exception as error:
        if f"{source}:" not in str(error):  # the invalid line, which is expected
            raise
    finally:
        if content is None or not path.is_file():
            for file in path.parents[1].glob("o_*"):
                file.unlink()
        path.parent.mkdir(exist_ok=True)


def make_input(name: str, pack: Callable[[bytes], bytes], folder: Path) -> Path:
    path = folder / name
    path.write_bytes(pack(LINES))
    return path


def read_input(path: Path) -> None:
    """Encode a file as preprocess_data does, without worker processes."""
    (source,) = find_input([str(path)]).sources if path.is_file() else (None,)
    if source is None:
        run_main(
            preprocess_data.main, "--input", path, "--output-prefix", path.with_name("o"), *BYTES
        )
        return
    tokenizer = load_tokenizer("ByteLevelTokenizer", None)
    encoder = BlockEncoder(tokenizer, EncodingOptions(KEYS, True, False, LIMIT, True))
    for block in read_blocks(source, 0, KEYS, LIMIT):
        if isinstance(block.payload, LongLine):
            assert sum(map(len, block.payload.parts)) == block.payload.length
        else:
            encoder.encode(block.payload)


def packed(pack: Callable[[bytes], bytes], content: bytes, generator: random.Random) -> bytes:
    """Return compressed lines that were changed before their compression."""
    return pack(mutated_json_lines(LINES, generator))


def bombs(pack: Callable[[bytes], bytes], _: bytes) -> list[bytes]:
    """Return small files of 120 MB in one line, of empty lines, and files with other ends."""
    size = 120_000_000
    return [
        *(pack(content) for content in HOSTILE[:12]),
        pack(b"\n" * (size // 12)),
        pack(b'{"text": "' + b"a" * size + b'"}\n' + LINES),
        pack(LINES) + pack(LINES),
        pack(LINES) + b"\0" * 100,
        pack(LINES) + b"garbage",
    ]


def parquet(lines: bytes) -> bytes:
    """Return lines as a Parquet table; invalid lines become text."""
    texts = [line.decode(errors="replace") for line in lines.splitlines()]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "n": list(range(len(texts)))}), stream
    )
    return stream.getvalue()


def other_tables(_: bytes) -> list[bytes]:
    """Return tables with columns of every type, and one that repeats a value."""
    found = []
    values = ([1], [None], [b"\xff"], [["a", None]], [[1]], [{"a": 1}], [1.5], [True], [],
              ["a" * 200_000] * 1000, ["a" * (LIMIT + 1)] * 20)  # fmt: skip
    for value in values:
        stream = io.BytesIO()
        table = pyarrow.table({"text": pyarrow.array(value)})
        pyarrow.parquet.write_table(table, stream, compression="zstd")
        found.append(stream.getvalue())
    return found


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "c.jsonl.gz": partial(gzip.compress, compresslevel=1),
    "c.jsonl.zst": zstandard.ZstdCompressor(level=1).compress,
    "c.jsonl.lz4": lz4.frame.compress,
    "c.jsonl.bz2": partial(bz2.compress, compresslevel=9),
    "c.jsonl.xz": partial(lzma.compress, preset=0),
    "c.jsonl.lzma": partial(lzma.compress, format=lzma.FORMAT_ALONE, preset=0),
}

JSON = (mutated_json, mutated_json, mutated_bytes)
LINES_OF_JSON = (mutated_json_lines, mutated_json_lines, mutated_bytes)

TARGETS = {
    "index": Target(
        write_index,
        read_dataset,
        (mutated_index, mutated_index, mutated_bytes),
        examples=400,
        names=r"d\.(idx|bin)",
    ),
    "tokens": Target(write_tokens, read_dataset, examples=60),
    "manifest of a dataset": Target(
        preprocess, read_manifest, JSON, examples=60, names="o_text_document"
    ),
    "facts of a dataset": Target(make_facts, read_facts, JSON),
    "contents of an index cache": Target(partial(make_cache, "contents.json"), read_cache, JSON),
    "array of an index cache": Target(
        partial(make_cache, "a.npy"), read_cache, (mutated_array_header, mutated_bytes)
    ),
    "journal": Target(
        make_journal, resume_journal, LINES_OF_JSON, examples=40, names="journal|o.partial"
    ),
    "c.jsonl": Target(partial(make_input, "c.jsonl", bytes), read_input, LINES_OF_JSON),
    **{
        name: Target(
            partial(make_input, name, pack),
            read_input,
            (partial(packed, pack), mutated_bytes),
            partial(bombs, pack),
            80,
        )
        for name, pack in FORMATS.items()
    },
    "c.parquet": Target(
        partial(make_input, "c.parquet", parquet),
        read_input,
        (partial(packed, parquet), mutated_bytes),
        other_tables,
        100,
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
