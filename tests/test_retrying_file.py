"""Logs that cannot be written, and output whose reader has exited."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from megatron_llmjp import retrying_file
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.retrying_file import RetryingFile
from tests.support.datasets import write_folds
from tests.support.processes import ROOT
from tests.support.training import arguments, history

OUTAGES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EACCES, errno.EROFS]


class Outage:
    """A system call that fails while ``on`` is True."""

    def __init__(self, monkeypatch, name: str, code: int) -> None:
        self.on, call = True, getattr(os, name)

        def failing(*arguments):
            if self.on:
                raise OSError(code, os.strerror(code))
            return call(*arguments)

        monkeypatch.setattr(retrying_file.os, name, failing)


@pytest.mark.parametrize("code", OUTAGES)
@pytest.mark.parametrize("call", ["open", "write"])
def test_failed_writes_are_repeated(tmp_path, monkeypatch, capfd, call, code):
    path = tmp_path / "logs" / "log"
    outage = Outage(monkeypatch, call, code)
    file = RetryingFile(path)
    for number in range(3):
        file.write(b"%d\n" % number)
    outage.on = False
    file.write(b"3\n")
    outage.on = True
    file.write(b"4\n")
    outage.on = False
    file.close()
    assert path.read_text() == "0\n1\n2\n3\n4\n"
    printed = capfd.readouterr().err
    assert printed.count(f"warning: {path} ") == (1 if call == "open" else 2)
    assert os.strerror(code) in printed


def test_the_folder_cannot_be_created(tmp_path, capfd):
    (tmp_path / "logs").write_text("in the way")
    file = RetryingFile(tmp_path / "logs" / "log")
    file.write(b"1\n")
    (tmp_path / "logs").unlink()
    file.close()
    assert (tmp_path / "logs" / "log").read_text() == "1\n"
    assert "cannot be written: " in capfd.readouterr().err


def test_pending_writes_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(retrying_file, "MAX_PENDING_BYTES", 40)
    outage = Outage(monkeypatch, "write", errno.ENOSPC)
    file = RetryingFile(tmp_path / "log")
    for number in range(100):
        file.write(b"line %02d\n" % number)
    outage.on = False
    file.close()
    assert (tmp_path / "log").read_text() == "".join(f"line {n}\n" for n in range(95, 100))


def test_a_deleted_file_is_recreated(tmp_path):
    file = RetryingFile(tmp_path / "logs" / "log")
    file.write(b"1\n")
    shutil.rmtree(tmp_path / "logs")
    file.write(b"2\n")
    file.close()
    assert (tmp_path / "logs" / "log").read_text() == "2\n"


def test_a_pipe_without_a_reader(capfd):
    reader, writer = os.pipe()
    file = RetryingFile(writer)
    os.close(reader)
    file.write(b"1\n")
    file.write(b"2\n")
    file.close()
    os.close(writer)
    assert capfd.readouterr().err.count("its reader has exited (Broken pipe)") == 1


def test_output_whose_reader_exits(tmp_path):
    """``pretrain_gpt ... | head``: launcher and ranks train until the end."""
    save = tmp_path / "save"
    words = arguments("laptop-llama", write_folds(tmp_path, (2, 2, 1)), "--save", save, "--report")
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *words, "--nproc-per-node", "2"]
    with (tmp_path / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        process.stdout.close()
        code = process.wait()
    printed = (tmp_path / "stderr").read_text()
    assert first and code == 0, printed
    assert "standard output: its reader has exited (Broken pipe); the run continues" in printed
    assert "Traceback" not in printed and "Exception" not in printed
    assert list(history(save)) == [1, 2, 3, 4, 5]
    assert manifests.complete_iterations(save) == [2, 4, 5]
    assert (save / "report" / "report.html").is_file()


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path, streams):
    """Other files do not get the descriptors of closed streams."""
    program = (
        "import sys; from megatron_llmjp.retrying_file import protect_standard_streams; "
        "protect_standard_streams(); print('text'); print('text', file=sys.stderr); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); sys.exit(file.fileno() < 3)"
    )
    command = f'{sys.executable} -c "{program}" {streams}'
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True).returncode == 0
    assert (tmp_path / "file").read_text() == ""
