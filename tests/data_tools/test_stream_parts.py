"""Parts of compressed and Parquet files: each line is in one part."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import lz4.frame
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.preprocess.array.shards import ShardPlan
from data_tools.preprocess.input.blocks import TableRows, read_blocks
from data_tools.preprocess.input.cutting import text_percentages, why_not_cut
from data_tools.preprocess.input.sources import InputSource, find_input
from megatron_llmjp.errors import UserError
from tests.data_tools.conftest import make_documents, write_jsonl


def pzstd(data: bytes) -> bytes:
    """A frame as pzstd writes it: after a skippable frame with its size."""
    frame = zstandard.compress(data)
    return b"\x50\x2a\x4d\x18\x04\0\0\0" + len(frame).to_bytes(4, "little") + frame


COMPRESS = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "pzstd": pzstd,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lz4": lz4.frame.compress,
}
SUFFIX = {"gzip": "gz", "zstd": "zst", "pzstd": "zst", "bzip2": "bz2", "xz": "xz", "lz4": "lz4"}


def source_of(path: Path) -> InputSource:
    return find_input([str(path)]).sources[0]


def parts_of(source: InputSource, count: int) -> list[bytes]:
    """Return the text of each part of equal bytes on disk."""
    bounds = [source.size * at // count for at in range(count + 1)]
    return [
        text_of(InputSource(source.name, source.size, source.mtime, True, start, end))
        for start, end in itertools.pairwise(bounds)
        if start < end
    ]


def text_of(part: InputSource) -> bytes:
    return b"".join(block.payload for block in read_blocks(part, 0, ["text"], 10**6))


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_each_line_is_in_one_part(kind, count, tmp_path):
    """Streams end within lines, at their ends, and within a line that is longer than streams."""
    lines = [line.encode() + b"\n" for line in make_documents(60, seed=3)]
    lines = [line.replace(b"\n", b" ")[:-1] + b"\n" for line in lines]
    lines[20] = bytes(random.Random(1).randbytes(9000)).replace(b"\n", b"") + b"\n"
    whole = b"".join(lines)
    cuts = sorted({*random.Random(2).sample(range(len(whole)), 12), whole.find(b"\n") + 1})
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    path = tmp_path / f"c.jsonl.{SUFFIX[kind]}"
    path.write_bytes(b"".join(map(COMPRESS[kind], pieces)))
    parts = parts_of(source_of(path), count)
    assert b"".join(parts) == whole
    assert all(part.endswith(b"\n") for part in parts if part)
    if count == 7:
        assert sum(bool(part) for part in parts) >= 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"a", b"\n")), max_size=12),
    st.integers(1, 6),
)
def test_any_text_in_any_streams(tmp_path_factory, pieces, count):
    path = tmp_path_factory.mktemp("any") / "c.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(piece, mtime=0) for piece in pieces or [b""]))
    assert b"".join(parts_of(source_of(path), count)) == b"".join(pieces)


def test_parts_resume_at_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 700)
    path = tmp_path / "c.jsonl.gz"
    lines = b"".join(b"%d %s\n" % (at, b"x" * (at % 90)) for at in range(300))
    path.write_bytes(b"".join(gzip.compress(lines[at : at + 1000]) for at in range(0, 9999, 1000)))
    source = source_of(path)
    part = InputSource(source.name, source.size, 0, True, source.size // 3, 2 * source.size // 3)
    blocks = list(read_blocks(part, 0, ["text"], 10**6))
    assert len(blocks) > 3
    for at, block in enumerate(blocks):
        rest = b"".join(b.payload for b in read_blocks(part, block.end, ["text"], 10**6))
        assert rest == b"".join(b.payload for b in blocks[at + 1 :])
        assert 0 <= block.disk_bytes <= part.length


@pytest.mark.skipif(shutil.which("pzstd") is None, reason="pzstd is not installed (Debian: zstd)")
def test_a_file_of_pzstd(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", make_documents(20000, seed=4))
    subprocess.run(["pzstd", "-q", "-1", "-p", "2", str(path)], check=True)
    source = source_of(tmp_path / "c.jsonl.zst")
    assert why_not_cut(source) == ""
    parts = parts_of(source, 3)
    assert b"".join(parts) == path.read_bytes()


def test_bytes_that_look_like_a_stream_are_refused(tmp_path):
    """A stored stream contains the bytes of another one: no text is lost or invented."""
    inner = gzip.compress(b'{"text": "inner"}\n' * 5)
    stored = gzip.compress(b"x" * 500 + inner + b"y" * 500 + b"\n", compresslevel=0)
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(stored + gzip.compress(b"last\n"))
    source = source_of(path)
    inside = stored.find(inner)
    first = InputSource(source.name, source.size, 0, True, 0, inside)
    with pytest.raises(UserError, match="the file cannot be divided at byte"):
        text_of(first)


def test_truncated_part_is_an_error(tmp_path):
    path = tmp_path / "c.jsonl.bz2"
    path.write_bytes(bz2.compress(b"a\n" * 99) + bz2.compress(b"b\n" * 99999)[:-9])
    source = source_of(path)
    with pytest.raises(UserError, match="truncated or damaged"):
        text_of(InputSource(source.name, source.size, 0, True, 1, source.size))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parquet_is_cut_between_row_groups(count, tmp_path):
    path, rows = tmp_path / "c.parquet", [f"{at} {'é' * (at * 7 % 50)}" for at in range(500)]
    pq.write_table(pa.table({"text": rows, "id": range(500)}), path, row_group_size=60)
    source = source_of(path)
    bounds = [source.size * at // count for at in range(count + 1)]
    if count == 2:  # exactly where the fourth group begins
        footer, columns = pq.read_metadata(path), range(2)
        groups = [footer.row_group(at) for at in range(3)]
        bounds[1] = sum(g.column(at).total_compressed_size for g in groups for at in columns)
    found = []
    for start, end in itertools.pairwise(bounds):
        part = InputSource(source.name, source.size, 0, True, start, end)
        blocks = list(read_blocks(part, 0, ["text"], 10**6))
        for block in blocks:
            assert isinstance(block.payload, TableRows)
            found += block.payload.columns["text"]
            assert 0 <= block.disk_bytes <= part.length
        for at, block in enumerate(blocks):  # resumes
            again = read_blocks(part, block.end, ["text"], 10**6)
            assert [b.end for b in again] == [b.end for b in blocks[at + 1 :]]
    assert found == rows
    assert why_not_cut(source) == ""


def test_files_that_cannot_be_cut_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    noise = random.Random(5).randbytes(20000).hex().encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(noise))
    (tmp_path / "b.jsonl.lzma").write_bytes(lzma.compress(noise, format=lzma.FORMAT_ALONE))
    pq.write_table(pa.table({"text": [noise.decode()]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(noise) + gzip.compress(noise))
    reasons = {Path(s.name).name: why_not_cut(s) for s in find_input([str(tmp_path)]).sources}
    assert reasons == {
        "a.jsonl.gz": "one gzip stream",
        "b.jsonl.lzma": "compressed in a format without independent streams",
        "c.parquet": "a Parquet file with one row group",
        "d.jsonl.gz": "",
    }
    warning = ShardPlan(find_input([str(tmp_path)]).sources, 30).warning()
    assert "a.jsonl.gz (" in warning and "one gzip stream" in warning
    assert "d.jsonl.gz" not in warning


def test_balance_by_text_of_mixed_formats(tmp_path):
    """Compressed files count with their text: measured with zlib and the Parquet footer."""
    text = "".join(
        f'{{"text": "{document[:300]!r}"}}\n' for document in make_documents(400, seed=6)
    )
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    column = io.BytesIO()
    pq.write_table(pa.table({"text": [text], "other": [text[::-1]]}), column, compression="zstd")
    (tmp_path / "c.parquet").write_bytes(column.getvalue())
    sources = find_input([str(tmp_path)]).sources
    percentages = text_percentages(sources, ["text"])
    assert percentages[0] == 100
    raw = len(zlib.decompress((tmp_path / "b.jsonl.gz").read_bytes(), wbits=31))
    assert percentages[1] == pytest.approx(100 * raw / sources[1].size, rel=0.05)
    assert percentages[2] * sources[2].size / 100 == pytest.approx(len(text.encode()), rel=0.05)
    parts = [[Path(s.name).name for s in ShardPlan(sources, 3).part(at)] for at in range(3)]
    assert parts == [["a.jsonl"], ["b.jsonl.gz"], ["c.parquet"]]
