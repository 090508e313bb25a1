"""Index cache with real processes: atomic, built once, rebuilt when damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_llmjp.data.indices import index_cache, worker
from megatron_llmjp.data.indices.index_cache import (
    atomic_folder,
    ensure_index,
    ensure_indices,
    find_damage,
)
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import acquire_lock
from tests.support.timeouts import wait_until


class Logged:
    """An index that writes a line to a log when it is built."""

    work = 0

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self.folder = folder
        self.seconds = seconds

    def build(self, temporary: Path) -> None:
        with (self.folder.parent.parent / "log").open("a") as log:
            log.write(f"{self.folder.name} {os.getpid()}\n")
        (temporary / "half").write_text("something")
        time.sleep(self.seconds)
        (temporary / "rest").write_text(self.folder.name)


def in_child(body) -> int:
    """Run ``body`` in a child process; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return child


def test_a_killed_builder_leaves_no_index(tmp_path):
    folder = tmp_path / "cache" / "a"
    child = in_child(lambda: ensure_index(folder, Logged(folder, 600).build))
    wait_until(lambda: list(tmp_path.glob("cache/a.tmp-*/half")))
    assert not ensure_index(folder, Logged(folder).build, wait=False)  # it is being built
    assert not folder.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not folder.exists()
    assert ensure_index(folder, Logged(folder).build)
    listed = {name: [len(data), zlib.crc32(data)] for name, data in
              (("half", b"something"), ("rest", b"a"))}  # fmt: skip
    assert json.loads((folder / "contents.json").read_text())["files"] == listed
    assert (folder / "rest").read_text() == "a"
    assert [p.name for p in folder.parent.iterdir()] == ["a"]  # nor temporary files


@pytest.mark.parametrize("locks", [True, False])
def test_many_builders_at_once(tmp_path, monkeypatch, locks):
    """With locks each index is built once; without locks the result is still correct."""
    if not locks:

        def unsupported(stream, how):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "lockf", unsupported)
    indices = [Logged(tmp_path / "cache" / f"i{n}", 0.05) for n in range(6)]
    children = [in_child(partial(ensure_indices, indices)) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    built = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert {name for name, _ in built} == {index.folder.name for index in indices}
    if locks:
        assert len(built) == 6
        assert len({process for _, process in built}) > 1  # they share the work
    for index in indices:
        assert find_damage(index.folder, thorough=True) is None
        assert (index.folder / "rest").read_text() == index.folder.name
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_the_lock_of_an_index_is_not_retried(tmp_path, monkeypatch):
    """While the file system does not respond, other indices are built, or this one without."""

    def no_response(descriptor: int, how: int) -> None:
        raise OSError(errno.EIO, "no response")

    def no_pause(seconds: float) -> None:
        raise AssertionError(f"waits for {seconds} s")

    monkeypatch.setattr(fcntl, "lockf", no_response)
    monkeypatch.setattr(time, "sleep", no_pause)
    with index_cache._try_lock(tmp_path / "cache" / "a") as mine:
        assert mine


def test_waiting_for_a_lock_times_out(tmp_path, monkeypatch):
    """NFS 3 keeps the lock of a machine that disappeared."""
    monkeypatch.setattr(index_cache, "LOCK_TIMEOUT_SECONDS", 0.2)
    folder = tmp_path / "cache" / "a"
    folder.parent.mkdir()
    locked = tmp_path / "locked"

    def hold() -> None:
        acquire_lock(tmp_path / "cache" / "a.lock")
        locked.touch()
        time.sleep(600)

    child = in_child(hold)
    wait_until(locked.exists)
    assert ensure_index(folder, Logged(folder).build)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("host", ["node1", "node-1.rack-2"])
def test_leftovers_of_killed_builders(tmp_path, monkeypatch, host):
    """Those of this machine's dead processes, and old ones of any machine."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr(index_cache.socket, "gethostname", lambda: host)
    folder = tmp_path / "a"
    young = [f"a.tmp-{host}-{os.getpid()}-000000", f"a.old-other-{dead.pid}-000000",
             f"ab.tmp-{host}-{dead.pid}-000000"]  # fmt: skip
    gone = [f"a.{kind}-{host}-{dead.pid}-000000" for kind in ("tmp", "old")]
    old = ["a.tmp-other-7-000000", f"a.old-{host}-{os.getpid()}-111111"]
    for name in (*young, *gone, *old):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in young:
        os.utime(tmp_path / name, times=(time.time() - 23 * 3600,) * 2)
    for name in old:
        os.utime(tmp_path / name, times=(time.time() - 25 * 3600,) * 2)
    ensure_index(folder, Logged(tmp_path / "x" / "a").build)
    assert {path.name for path in tmp_path.iterdir()} - {"log"} == {"a", *young}


def test_an_index_in_use_on_nfs_can_be_replaced(tmp_path, monkeypatch):
    """Open files that are deleted stay in their folder as .nfs..., so it cannot be removed yet."""

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    index = tmp_path / "index"
    index.mkdir()
    (tmp_path / f"{index.name}.tmp-{socket.gethostname()}-{2**22}-a").mkdir()  # no such process
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        index_cache._remove_abandoned(index)
        index_cache._remove(index)
    assert not index.exists()
    index_cache._remove_abandoned(index)
    left = [path.name for path in tmp_path.iterdir()]
    assert [name.partition("-")[0] for name in left] == ["index.old"]  # of this process


def test_the_first_of_two_builders_wins(tmp_path):
    folder = tmp_path / "a"
    with atomic_folder(folder) as slow:
        (slow / "file").write_text("second")
        with atomic_folder(folder) as fast:
            (fast / "file").write_text("first")
    assert (folder / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def damages():
    def cut(folder):
        os.truncate(folder / "rest", 0)

    def flip(folder):
        (folder / "half").write_text("somethinG")

    def take(folder):
        (folder / "half").unlink()

    def unlist(folder):
        (folder / index_cache.CONTENTS_FILE).unlink()

    def garble(folder):
        (folder / index_cache.CONTENTS_FILE).write_text("{")

    return [cut, flip, take, unlist, garble]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_another_size_is_damage(tmp_path, size):
    """Without reading the files."""
    folder = tmp_path / "ab"
    ensure_index(folder, Logged(folder).build)
    assert find_damage(folder) is None
    os.truncate(folder / "rest", size)
    assert find_damage(folder) == f"rest has {size} bytes, expected 2"


@pytest.mark.parametrize("change", [-8, 8])
def test_arrays_have_the_size_in_their_header(tmp_path, change):
    """megatron-core maps them into memory."""

    def build(folder: Path) -> None:
        np.save(folder / "array.npy", np.arange(4))
        os.truncate(folder / "array.npy", 160 + change)

    whole, wrong = tmp_path / "whole", tmp_path / "wrong"
    ensure_index(whole, lambda folder: np.save(folder / "array.npy", np.arange(4)))
    assert find_damage(whole) is None and (whole / "array.npy").stat().st_size == 160
    with atomic_folder(wrong) as temporary:
        build(temporary)
    expected = f"array.npy has {160 + change} bytes, but its header requires 160"
    assert find_damage(wrong) == expected


@pytest.mark.parametrize("damage", damages(), ids=lambda f: f.__name__)
def test_damage_is_detected_and_repaired(tmp_path, capsys, damage):
    folder = tmp_path / "cache" / "a"
    ensure_index(folder, Logged(folder).build)
    damage(folder)
    assert find_damage(folder, thorough=True)
    assert ensure_index(folder, Logged(folder).build, thorough=True)
    assert find_damage(folder, thorough=True) is None
    assert f"warning: {folder}: " in capsys.readouterr().err
    assert [p.name for p in folder.parent.iterdir()] == ["a"]


def test_an_unwritable_cache_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-cache-path"):
        ensure_index(tmp_path / "file" / "a", Logged(tmp_path / "file" / "a").build)
    if os.geteuid() != 0:  # root ignores permissions
        (tmp_path / "cache").mkdir(mode=0o500)
        with pytest.raises(UserError, match="--data-cache-path"):
            ensure_index(tmp_path / "cache" / "a", Logged(tmp_path / "cache" / "a").build)


def test_the_worker_ends_with_its_rank(tmp_path):
    """Also if the rank is killed."""
    program = (
        "import time, functools, os, signal\n"
        "from megatron_llmjp.data.indices import worker\n"
        "child = worker.start_job(functools.partial(time.sleep, 600))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as rank:
        child = int(rank.stdout.readline())
        os.kill(child, 0)
        rank.kill()
    wait_until(lambda: not alive(child))


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_failure_of_the_worker_raises(tmp_path, capfd):
    broken = SimpleNamespace(folder=tmp_path, build=partial(os.rename, str(tmp_path / "nothing")))
    with pytest.raises(RuntimeError, match="exit code 1"):
        worker.build_in_subprocess(broken, tmp_path)
    assert "FileNotFoundError" in capfd.readouterr().err
