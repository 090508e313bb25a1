"""Error messages of failed writes."""

from __future__ import annotations

import errno
import io
import os

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_llmjp.checkpoint.writer import ThreadedWriter


class FullDisk(io.FileIO):
    """A file on a disk with a given number of free bytes."""

    room = 0

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        type(self).room -= len(data)
        return super().write(data)


def test_a_full_disk_is_reported_at_any_write(tmp_path, monkeypatch):
    """torch's archive writer would report "unexpected pos 704 vs 598"."""
    item = WriteItem(index=MetadataIndex("a"), type=WriteItemType.TENSOR)
    path = tmp_path / "x.distcp"
    monkeypatch.setattr("pathlib.Path.open", lambda self, *_, **__: FullDisk(self, "wb"))
    whole = False
    for room in range(0, 8000, 97):
        FullDisk.room = room
        writer = ThreadedWriter(tmp_path)
        writer._files = {path.name: [(item, torch.zeros(1000))]}
        writer.write()
        if writer._error is None:
            whole = True
            continue
        assert isinstance(writer._error, OSError) and not whole
        assert (writer._error.errno, writer._error.filename) == (errno.ENOSPC, str(path))
    assert whole and path.stat().st_size > 4000
