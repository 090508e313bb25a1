"""Removal of old checkpoints after the newest one is verified."""

from __future__ import annotations

import json
import pickle
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import publish, removal
from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.checkpoint.removal import CheckpointRemover
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.config.schema import CheckpointConfig

MODEL = ("--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1")


def save(root: Path, iteration: int, persistent: bool = True) -> Path:
    """Write a checkpoint without tensors."""
    publish.create_temporary_folder(root, iteration)
    folder = publish.temporary_folder(root, iteration)
    contents = {
        manifests.CONFIG: dump_config(parse(list(MODEL))[0]).encode(),
        ".metadata": pickle.dumps(Metadata({}, storage_data={})),
        "metadata.json": b"{}",
        "__0_0.distcp": bytes(1000),
    }
    files = {name: publish.write_small_file(folder, name, data) for name, data in contents.items()}
    fields = {"iteration": iteration, "consumed_samples": 4 * iteration, "contents": "full"}
    manifest = Manifest(**fields, files=files, persistent=persistent)
    return publish.publish_checkpoint(root, manifest)


def make_remover(root: Path, may_remove: Callable[[], bool] = lambda: True) -> CheckpointRemover:
    return CheckpointRemover(
        root, CheckpointConfig(save=str(root), keep_last=1), frozenset(), may_remove
    )


def left(root: Path) -> list[int]:
    return manifests.complete_iterations(root)


def test_older_ones_are_removed(tmp_path, capsys):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    worker = make_remover(tmp_path)
    worker.start(3)
    worker.wait()
    assert left(tmp_path) == [3] and not list(tmp_path.glob(".iter_*"))
    output = capsys.readouterr().out.splitlines()
    assert output == [f"removing checkpoint {tmp_path / f'iter_000000{i}'}" for i in (1, 2)]
    save(tmp_path, 4)
    worker.start(4)  # a second removal
    worker.wait()
    assert left(tmp_path) == [4]


def test_only_the_newest_non_persistent_one_is_kept(tmp_path):
    """Others are untouched, including one that cannot be read."""
    for iteration in (1, 2, 3, 4, 5):
        save(tmp_path, iteration, persistent=iteration in (1, 3))
    unreadable = tmp_path / "iter_0000002" / "manifest.json"
    unreadable.write_text("{")
    worker = CheckpointRemover(
        tmp_path, CheckpointConfig(save=str(tmp_path)), frozenset(), lambda: True
    )
    worker.start(5)
    worker.wait()
    assert left(tmp_path) == [1, 2, 3, 5]
    save(tmp_path, 6)
    worker.start(6)
    worker.wait()
    assert left(tmp_path) == [1, 2, 3, 6]


def test_earlier_versions_read_persistent_ones(tmp_path):
    """They refuse unknown fields."""
    for iteration, persistent in ((1, True), (2, False)):
        folder = save(tmp_path, iteration, persistent)
        written = json.loads((folder / "manifest.json").read_bytes())
        assert written.get("persistent") is (None if persistent else False)
        assert manifests.read_manifest(folder).persistent is persistent


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("manifest.json", "cannot be read"),
        ("__0_0.distcp", "does not have the checksum"),
        ("config.yaml", ""),
        (".metadata", ""),
        ("metadata.json", ""),
    ],
)
def test_none_is_removed_if_the_newest_is_damaged(tmp_path, capsys, name, said):
    """The previous one is resumed from, and the next good save removes old ones."""
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / name
    damaged.write_bytes(b"\1" * damaged.stat().st_size)
    worker = make_remover(tmp_path)
    worker.start(2)
    worker.wait()
    assert left(tmp_path) == [1, 2] and manifests.read_tracker(tmp_path) == (1, [])
    error = capsys.readouterr().err
    assert f"error: cannot resume from {tmp_path / 'iter_0000002'}: " in error
    assert said in error and "No checkpoint is removed" in error
    save(tmp_path, 3)
    worker.start(3)
    worker.wait()
    assert left(tmp_path) == [3]


def test_none_is_removed_while_steps_are_bad(tmp_path):
    """Also if they became bad during the verification."""
    for iteration in (1, 2):
        save(tmp_path, iteration)
    worker = make_remover(tmp_path, lambda: False)
    worker.start(2)
    worker.wait()
    assert left(tmp_path) == [1, 2]


def test_a_slow_verification_blocks_nothing(tmp_path, monkeypatch):
    """A checkpoint published meanwhile is verified next; none is removed before."""
    reading, may_end = threading.Event(), threading.Event()
    checked = []

    def slow(folder, is_cancelled):
        checked.append(folder.name)
        reading.set()
        may_end.wait()
        return read_back(folder, is_cancelled)

    read_back = removal.verify_checkpoint
    monkeypatch.setattr(removal, "verify_checkpoint", slow)
    for iteration in (1, 2):
        save(tmp_path, iteration)
    worker = make_remover(tmp_path)
    worker.start(2)
    reading.wait()
    for iteration in (3, 4):
        save(tmp_path, iteration)
        worker.start(iteration)
    assert left(tmp_path) == [1, 2, 3, 4]
    may_end.set()
    worker.wait()
    assert left(tmp_path) == [4] and checked == ["iter_0000002", "iter_0000004"]


def test_a_verification_is_cancelled(tmp_path, monkeypatch, capsys):
    """A stopping run does not wait for it, and removes nothing."""

    reading = threading.Event()

    def endless(folder, is_cancelled):
        reading.set()
        while not is_cancelled():
            pass
        return ["not finished"]

    monkeypatch.setattr(removal, "verify_checkpoint", endless)
    for iteration in (1, 2):
        save(tmp_path, iteration)
    worker = make_remover(tmp_path)
    worker.start(2)
    reading.wait()
    worker.wait(0.0)
    assert left(tmp_path) == [1, 2] and manifests.read_tracker(tmp_path) == (2, [])
    assert "older checkpoints are kept" in capsys.readouterr().out


def test_no_metric_makes_a_manifest_unreadable(tmp_path):
    """Including null, which earlier versions wrote."""
    values = {"lm loss": float("nan"), "inf": float("inf"), "tokens per second": 5.0}
    fields = {"iteration": 1, "consumed_samples": 4, "contents": "full", "files": {}}
    manifests.write_manifest(tmp_path, Manifest(**fields, metrics=values))
    assert manifests.read_manifest(tmp_path).metrics == {"tokens per second": 5.0}
    text = Manifest(**fields, metrics={"a": 1.0}).model_dump_json().replace('"a":1.0', '"a":null')
    (tmp_path / manifests.MANIFEST).write_text(text)
    assert manifests.read_manifest(tmp_path).metrics == {}


def test_a_manifest_damaged_on_disk_is_not_published(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write = manifests.write_manifest

    def damaged(folder, manifest):
        write(folder, manifest.model_copy(update={"consumed_samples": 7}))

    monkeypatch.setattr(manifests, "write_manifest", damaged)
    with pytest.raises(OSError, match="differs from what was written"):
        save(tmp_path, 2)
    assert left(tmp_path) == [1] and manifests.read_tracker(tmp_path) == (1, [])


def test_leftovers_are_deleted_before_a_save(tmp_path):
    """Of interrupted saves, removals and trackers; nothing else."""
    (tmp_path / ".iter_0000003.tmp" / "tokenizer").mkdir(parents=True)
    for name in (".iter_0000003.tmp/tokenizer/a", ".iter_0000003.tmp/b"):
        (tmp_path / name).touch()
    (tmp_path / ".iter_0000002.removed.tmp").mkdir()
    (tmp_path / ".iter_0000004.replaced.tmp").mkdir()
    for name in (f".{manifests.TRACKER}.1234.tmp", manifests.TRACKER, "notes.tmp"):
        (tmp_path / name).write_text("7")
    (tmp_path / "iter_0000003").mkdir()
    beats = []
    publish.create_temporary_folder(tmp_path, 5, lambda: beats.append(1))
    assert {path.name for path in tmp_path.iterdir()} == {
        ".iter_0000005.tmp", "iter_0000003", manifests.TRACKER, "notes.tmp",
    }  # fmt: skip
    assert len(beats) == 4 + 1 + 1  # after each file and folder
    entry = publish.write_small_file(tmp_path / ".iter_0000005.tmp", "folder/file", b"content")
    assert (tmp_path / ".iter_0000005.tmp" / "folder" / "file").read_bytes() == b"content"
    assert (entry.bytes, entry.crc32) == (7, f"{zlib.crc32(b'content'):08x}")
