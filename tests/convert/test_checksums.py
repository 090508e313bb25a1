"""Checksums of source files: flipped bits are errors in all formats that have checksums."""

from __future__ import annotations

import random
import zipfile
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import FileTensor
from megatron_llmjp.convert.files.torch_dist import read_metadata
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import llama

FIXTURE = Path(__file__).parent / "fixtures" / "mds_gpt_tp2pp2dp2_bf16z1" / "ckpt"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def inside_a_tensor(path: Path) -> int:
    """Return an offset in the largest entry of an archive."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    return entry.header_offset + entry.file_size // 2 + 200


@pytest.mark.parametrize(
    "flags",
    [
        ["--to", "native"],
        ["--to", "megatron-lm"],
        ["--to", "megatron-lm", "--ckpt-format", "torch"],
        ["--to", "megatron-deepspeed", "--target-tensor-parallel-size", "2"],
    ],
)
def test_a_flipped_bit_is_found(tmp_path, convert, flags):
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert(*flags, "--input", tmp_path / "hf", "--output", tmp_path / "there")
    back = ("--to", "hf", "--input", tmp_path / "there", "--output", tmp_path / "o")
    assert " verified" in convert(*back, "--dry-run") + convert(*back)
    (tmp_path / "o").rename(tmp_path / "good")
    files = [p for p in (tmp_path / "there").rglob("*") if p.suffix in (".pt", ".distcp")]
    victim = max(files, key=lambda path: path.stat().st_size)
    where = victim.stat().st_size // 2 if victim.suffix == ".distcp" else inside_a_tensor(victim)
    flip(victim, where)
    text = convert(*back, code=2)
    assert f"{victim}: damaged" in text
    assert text.splitlines()[-1].count("\n") == 0
    assert not (tmp_path / "o").exists()


def test_torch_archives_have_checksums(tmp_path, convert):
    model = llama()
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    flip(tmp_path / "hf" / "pytorch_model.bin",
         inside_a_tensor(tmp_path / "hf" / "pytorch_model.bin"))  # fmt: skip
    text = convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "o", code=2)
    assert "pytorch_model.bin: damaged" in text


def test_native_files_are_read_completely_without_no_checksums(tmp_path, convert):
    """A manifest has one checksum per file, which contains weights and moments."""
    native = tmp_path / "native"
    convert("--to", "native", "--with-optimizer", "--input", FIXTURE, "--output", native)
    moments = read_metadata(native / "iter_0000002")["optimizer.state.exp_avg.decoder.layers.mlp."
                                                     "linear_fc1.weight"]  # fmt: skip
    path, offset, length = next(iter(moments.chunks.values()))
    flip(path, offset + length // 2)
    words = ("--to", "hf", "--input", native, "--output", tmp_path / "o")
    assert "its content does not match the checksum in its manifest" in convert(*words, code=2)
    assert not (tmp_path / "o").exists()
    assert "checksums: not verified" in convert(*words, "--no-checksums")


@pytest.mark.parametrize("stride", [None, (1, 8)])
def test_bytes_that_were_read_are_not_read_again(tmp_path, stride):
    """The last tensor of a range completes it: the file may be gone by the end."""
    content = random.Random(4).randbytes(96)
    path = tmp_path / "a"
    path.write_bytes(content)
    whole = ChecksumRange(path, 16, 64, zlib.crc32(content[16:80]), "a test")
    wrong = ChecksumRange(path, 16, 64, zlib.crc32(content[16:80]) ^ 1, "a test")
    one = FileTensor(path, 16, (4, 2), DType.float32, None, whole)
    other = FileTensor(path, 48, (8, 4), DType.uint8, stride, whole)
    both = [one.read(), other.read(), FileTensor(path, 16, (0,), DType.uint8, None, whole).read()]
    expected = torch.frombuffer(bytearray(content[48:80]), dtype=torch.uint8)
    expected = expected.view(8, 4) if stride is None else expected.view(4, 8).t()
    assert torch.equal(both[1], expected)
    assert one.checksum_ranges == other.checksum_ranges == (whole,)
    assert FileTensor(path, 0, (1,), DType.uint8).checksum_ranges == ()
    replace(one, checksum_range=wrong).read()
    with pytest.raises(UserError, match="does not match the checksum in a test"):
        replace(other, checksum_range=wrong).read()
    path.unlink()
    whole.finish()
    with pytest.raises(UserError, match="a: cannot be read: No such file or directory"):
        ChecksumRange(path, 16, 64, zlib.crc32(content[16:80]), "a test").finish()


def test_parts_in_any_order_give_the_checksum_of_the_range(tmp_path):
    generator = random.Random(3)
    content = generator.randbytes(10_000)
    (tmp_path / "a").write_bytes(content)
    for _ in range(30):
        cuts = [*sorted(generator.sample(range(100, 9900), 6)), 9900]
        pieces = list(pairwise(cuts))
        chosen = generator.sample(pieces, generator.randint(0, 6))
        if generator.random() < 0.3:
            chosen.append((cuts[0], cuts[3]))  # overlaps another piece
        expected = zlib.crc32(content[100:9900])
        for crc in (expected, expected ^ 1):
            checksum_range = ChecksumRange(tmp_path / "a", 100, 9800, crc, "a test")
            try:
                for start, end in chosen:
                    checksum_range.add(start, memoryview(content)[start:end])
                checksum_range.finish()
            except UserError as error:
                assert crc != expected
                assert "does not match the checksum in a test" in str(error)
            else:
                assert crc == expected
