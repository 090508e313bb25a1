"""Content keys of datasets, and the edits that they detect."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_llmjp.data.folds import datasets as fold_datasets
from megatron_llmjp.data.folds.datasets import (
    compute_keys,
    files_stamp,
    largest_id,
    with_recorded_keys,
)
from megatron_llmjp.data.folds.schedule import DatasetInfo
from tests.support.datasets import write_dataset

MIB = 1 << 20


def overwrite(path, place, data=b"\xff\xff"):
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)


def closed_form(prefix, checksums=""):
    """Return the key: no version may change it, it determines the order of a run's samples."""
    files = [(prefix.with_suffix(".idx").read_bytes(), 64, 65536)]
    files.append((prefix.with_suffix(".bin").read_bytes(), 128, 8192))
    digest = hashlib.sha256("/".join(str(len(data)) for data, _, _ in files).encode())
    for data, blocks, size in files:
        last = max(0, len(data) - size)
        for start in sorted({number * last // (blocks - 1) for number in range(blocks)}):
            digest.update(zlib.crc32(data[start : start + size]).to_bytes(4, "little"))
    digest.update(checksums.encode())
    return digest.hexdigest()[:32]


def test_edits_are_detected(tmp_path):
    prefix, bin_file = tmp_path / "a", tmp_path / "a.bin"
    write_dataset(prefix, 100, seed=1)
    keys = [compute_keys(str(prefix)).key]
    for place in (0, bin_file.stat().st_size // 2, bin_file.stat().st_size - 2):
        overwrite(bin_file, place)  # a token, at equal lengths
        keys.append(compute_keys(str(prefix)).key)
    with bin_file.open("ab") as stream:
        stream.write(b"\0\0")
    keys.append(compute_keys(str(prefix)).key)
    assert len(set(keys)) == len(keys)
    assert keys[-1] == closed_form(prefix)

    # Neither path nor manifest is part of a dataset's identity.
    manifest = {"bin": {"crc32": "00000000"}, "idx": {"crc32": "00000000"}, "tokens": 5}
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    found = compute_keys(str(prefix))
    assert found.key == keys[-1]
    assert found.earlier == closed_form(prefix, "bin 00000000idx 00000000")
    assert found.checksums == "bin 00000000, idx 00000000"
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prefix.with_suffix(suffix), tmp_path / "elsewhere")
    (tmp_path / "elsewhere/a.json").write_text(json.dumps({**manifest, "tokens": 6}))
    assert compute_keys(str(tmp_path / "elsewhere/a")).key == keys[-1]


def test_a_large_file_is_sampled(tmp_path):
    """An edit of 1 MiB is always detected; a single token between the blocks is not."""
    prefix = tmp_path / "a"
    write_dataset(prefix, 100, seed=1)
    with prefix.with_suffix(".bin").open("r+b") as stream:
        stream.truncate(64 * MIB)
    before = compute_keys(str(prefix)).key
    assert before == closed_form(prefix)
    seen = 0
    for place in np.linspace(0, 64 * MIB - MIB, 16).astype(
        int
    ):  # 1 MiB contains at least one block
        overwrite(prefix.with_suffix(".bin"), int(place), b"\xff" * MIB)
        seen += compute_keys(str(prefix)).key != before
        overwrite(prefix.with_suffix(".bin"), int(place), b"\0" * MIB)
        before = compute_keys(str(prefix)).key
    assert seen == 16


def test_keys_of_earlier_versions(tmp_path, monkeypatch):
    """Their checksums are computed from files of at most 64 GiB, if a run recorded them."""
    assert fold_datasets._MAX_CHECKSUM_BYTES == 64 * 2**30
    found, known = {}, []
    for name in ("a", "b"):
        write_dataset(tmp_path / name, 50, seed=ord(name))
        sums = "".join(
            f"{kind} {zlib.crc32((tmp_path / f'{name}.{kind}').read_bytes()):08x}"
            for kind in ("bin", "idx")
        )
        path = str(tmp_path / name)
        known.append((closed_form(tmp_path / name, sums), path))
        found[path] = DatasetInfo(compute_keys(path).key, 1)
    one, other = found
    size = (tmp_path / "a.bin").stat().st_size
    monkeypatch.setattr(fold_datasets, "_MAX_CHECKSUM_BYTES", size)
    (recorded, _), _ = known
    again = with_recorded_keys(found, [(recorded, one)])
    assert (again[one].key, again[other].key) == (recorded, found[other].key)
    assert with_recorded_keys(found, [(found[one].key, one)]) == found  # of this version
    assert with_recorded_keys(found, [("unknown", one), ("unknown", "/nowhere")]) == found
    monkeypatch.setattr(fold_datasets, "_MAX_CHECKSUM_BYTES", size - 1)
    assert with_recorded_keys(found, [(recorded, one)]) == found
    # Those in a manifest are not computed: the run keeps them for all its datasets.
    stated = {path: replace(info, legacy_key=f"old {path}") for path, info in found.items()}
    kept = with_recorded_keys(stated, [(f"old {one}", one)])
    assert {path: info.key for path, info in kept.items()} == {
        one: f"old {one}",
        other: f"old {other}",
    }
    mixed = with_recorded_keys(stated, [(f"old {one}", one), (found[other].key, other)])
    assert {path: info.key for path, info in mixed.items()} == {
        one: f"old {one}", other: found[other].key,
    }  # fmt: skip


def test_the_stamp_of_files(tmp_path):
    """It is the name of the cached facts: another format must have another one."""
    write_dataset(tmp_path / "a", 50, seed=1)
    expected: list[object] = [5, str(tmp_path / "a")]
    for suffix in (".idx", ".bin"):
        s = (tmp_path / f"a{suffix}").stat()
        expected.append([suffix, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns])
    digest = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
    assert files_stamp(str(tmp_path / "a")) == digest[:32]


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint16, 65535), (np.int32, 2**32 - 1)])
def test_the_largest_id(tmp_path, dtype, largest):
    """Of all tokens, or of 64 blocks of 32,768; -1, which is damage, is above every vocabulary."""

    def found(tokens):
        tokens.tofile(tmp_path / "d.bin")
        return largest_id(SimpleNamespace(dtype=tokens.dtype, prefix=tmp_path / "d"))

    small = np.zeros(64 * 32768, dtype)
    for place in (0, 12345, -1):
        small[place] = 7 + place % 7
        assert found(small) == small.max()
    small[9] = np.array([-1]).astype(dtype)[0]
    assert found(small) == largest
    large = np.zeros(64 * 32768 + 1_000_000, dtype)
    starts = [number * (len(large) - 32768) // 63 for number in range(64)]
    for inside in (starts[0], starts[1], starts[1] + 32767, len(large) - 1):
        large[inside] = 5
        assert found(large) == 5
        large[inside] = 0
    large[starts[0] + 32768] = 5  # between two blocks
    assert found(large) == 0
    assert found(np.zeros(0, dtype)) is None
    floats = np.ones(3, np.float32)
    assert largest_id(SimpleNamespace(dtype=floats.dtype, prefix=None)) is None
