"""Content keys of datasets, and the edits that they detect."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib

import numpy as np

from megatron_llmjp.data.folds.datasets import compute_keys
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
