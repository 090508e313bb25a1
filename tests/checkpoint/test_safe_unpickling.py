"""Checkpoints with code or with paths outside their folder are refused; no code is executed."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import zipfile
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import safe_unpickling
from megatron_llmjp.errors import UserError


class Malicious:
    """Executes a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (os.system, (f"touch {self.proof}",))


@pytest.fixture
def folder(tmp_path):
    """A small torch_dist folder, written by torch."""
    return write(tmp_path / "checkpoint", rng=[1, 2], common={"iteration": 1})


def write(folder: Path, rng: object, common: object, name: str = "__0_0.distcp") -> Path:
    folder.mkdir(exist_ok=True)
    saved = io.BytesIO()
    torch.save(rng, saved)
    (folder / "__0_0.distcp").write_bytes(saved.getvalue())
    torch.save(common, folder / "common.pt")
    size = torch.Size([2])
    index = Metadata(
        {
            "weight": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16),
                size,
                [ChunkStorageMetadata(torch.Size([0]), size)],
            ),
            "rng_state/shard_0_1": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("rng_state/shard_0_1"): _StorageInfo(name, 0, len(saved.getvalue()))
        },
    )
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_data_is_accepted(folder):
    safe_unpickling.check_pickles(folder)
    index = safe_unpickling.read_index(folder)
    assert index.state_dict_metadata["weight"].properties.dtype == torch.bfloat16


class OtherPython(pickle.Pickler):
    """Pickles enum members like Python 3.11.0 to 3.11.3."""

    def reducer_override(self, value):
        if isinstance(value, Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def test_indices_of_every_python_are_read(folder):
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.storage_meta = StorageMeta(checkpoint_id=Path("there"))
    stream = io.BytesIO()
    OtherPython(stream, protocol=2).dump(index)
    # The class name in Python 3.13.
    written = re.sub(rb"cpathlib(\._local)?\n", b"cpathlib._local\n", stream.getvalue())
    assert b"getattr" in written and b"pathlib._local" in written
    path.write_bytes(written)
    safe_unpickling.check_pickles(folder)
    assert safe_unpickling.read_index(folder) == index


@pytest.mark.parametrize("where", ["common.pt", "__0_0.distcp", ".metadata"])
def test_code_is_refused_and_not_executed(tmp_path, folder, where, monkeypatch):
    # Disables torch's own weights_only default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    malicious = Malicious(tmp_path / "proof")
    if where == "common.pt":
        write(folder, [1], {"optimizer": malicious})
    elif where == ".metadata":
        (folder / where).write_bytes(pickle.dumps(malicious))
    else:
        write(folder, [malicious], {})
    with pytest.raises(UserError, match=rf"{where}: refused: .*posix\.system.*nothing.* executed"):
        safe_unpickling.check_pickles(folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "callable_",
    [
        b"cbuiltins\neval\n",
        b"cbuiltins\ngetattr\n",
        b"cbuiltins\ngetattr\n(ctorch\nSize\n\x8c\x05counttR",
        b"cos\nsystem\n",
        b"ctorch\nload\n",
        b"ctorch.serialization\nos\n",
        b"\x8c\x08torch.os\x8c\x06system\x93",
        b"ctorch.distributed.checkpoint.filesystem\npickle\n",
    ],
)
def test_callables_behind_allowed_names(folder, callable_):
    (folder / ".metadata").write_bytes(b"\x80\x04" + callable_ + b"(tR.")
    with pytest.raises(UserError, match="refused"):
        safe_unpickling.check_pickles(folder)


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "..", ""])
def test_index_cannot_leave_its_folder(tmp_path, name):
    folder = write(tmp_path / "checkpoint", [1], {}, name)
    with pytest.raises(UserError, match=r"\.metadata: names a file outside its folder"):
        safe_unpickling.check_pickles(folder)


@pytest.mark.parametrize(
    ("place", "accepted"),
    [
        (("__0_0.distcp", 0, 2**63 - 1), True),
        (("__0_0.distcp", 2**63 - 1, 0), True),
        (("__0_0.distcp", 2**63, 0), False),
        (("__0_0.distcp", 0, 2**63), False),
        (("__0_0.distcp", -1, 5), False),
        (("__0_0.distcp", 0, -1), False),
        (("__0_0.distcp", True, 5), False),
        (("__0_0.distcp", 0, 5.0), False),
        (("a\0b", 0, 5), False),
        ((b"__0_0.distcp", 0, 5), False),
    ],
)
def test_places_of_the_index(folder, place, accepted):
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.storage_data = {MetadataIndex("weight"): _StorageInfo(*place)}
    path.write_bytes(pickle.dumps(index))
    if accepted:
        assert safe_unpickling.read_index(folder) == index
        return
    name, offset, length = place
    with pytest.raises(UserError) as caught:
        safe_unpickling.read_index(folder)
    text = f"{name!r} at {offset!r}, length {length!r}"
    assert str(caught.value) == f"{path}: damaged: {TypeError(text)!r}"


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "empty"])
def test_damage_is_reported_as_damage(folder, name, damage):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(
        {"zeros": b"\0" * len(whole), "cut": whole[: len(whole) // 2], "empty": b""}[damage]
    )
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        safe_unpickling.check_pickles(folder)


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "a/../../b"])
def test_manifest_cannot_leave_its_folder(tmp_path, name):
    entry = manifests.FileEntry(bytes=1, crc32="0" * 8)
    manifests.write_manifest(
        tmp_path,
        manifests.Manifest(iteration=1, consumed_samples=1, contents="full", files={name: entry}),
    )
    with pytest.raises(UserError, match="names a file outside its folder"):
        manifests.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("compressed", "its entries are compressed, unlike those of torch.save"),
        ("overlapping", "its entries are larger than the file"),
    ],
)
def test_archives_that_grow_in_memory_are_refused(folder, damage, message):
    """Compressed entries, or many that share their bytes."""
    path = folder / "common.pt"
    torch.save({"a": torch.arange(500.0)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    kind = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        if damage == "overlapping":
            (large,) = (entry for entry in archive.filelist if entry.filename.endswith("data/0"))
            for number in range(2):
                archive.filelist.append(copy.copy(large))
                archive.filelist[-1].filename = f"again {number}"
    with pytest.raises(UserError, match=f"common.pt: damaged: {message}$"):
        safe_unpickling.check_pickles(folder)
