"""pretrain_gpt.py in separate processes: signals, kills and exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from tests.support.datasets import write_folds
from tests.support.processes import ROOT, pretrain, pretrain_in_new_interpreter
from tests.support.timeouts import PROCESS_TIMEOUT
from tests.support.training import arguments, history
from tests.support.witness import assert_files_match_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_folds(folder, (2000, 5, 5), repeat=True)
    return folder


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Start the launcher of two ranks, and kill all processes at the end."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *words, "--nproc-per-node", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for found in [*ranks_of(process.pid), process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                found.kill()
        process.communicate()


def ranks_of(launcher: int) -> list[psutil.Process]:
    """Return all descendants of the launcher."""
    try:
        return psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read the output until a line contains ``text``."""
    output, end = "", time.monotonic() + PROCESS_TIMEOUT
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if text in line:
            return output
        if time.monotonic() > end:
            break
    raise AssertionError(f"'{text}' was not printed:\n{output}\n{process.communicate()[1]}")


def assert_exited(ranks: list[psutil.Process]) -> None:
    assert len(ranks) >= 2
    _, alive = psutil.wait_procs(ranks, timeout=PROCESS_TIMEOUT)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def assert_whole(save: Path) -> Path:
    """Return the newest checkpoint after verifying its checksums."""
    newest = manifests.newest_checkpoint(save)
    assert_files_match_manifest(newest)
    return newest


@pytest.mark.long
@pytest.mark.fault(
    "Ctrl-C once and twice, a damaged checkpoint, a rank and the launcher killed, in one run",
    "saved with exit code 3, or ended immediately; no process remains",
)
def test_interrupted_and_killed(folder, tmp_path):
    """Ctrl-C, a damaged checkpoint, a killed rank and a killed launcher, in this order."""
    save = tmp_path / "run"
    words = arguments("laptop-llama", folder / "folds.yaml", "--save", save, "--save-interval", 3)
    words += ["--tensor-model-parallel-size", "2"]

    with started(*words) as process:
        wait_for(process, "iter_0000006")
        ranks = ranks_of(process.pid)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode == 3, errors
        assert_exited(ranks)
        assert "Traceback" not in errors
        stopped = re.search(r"stopped at iteration (\d+): signal received", output)
    newest = assert_whole(save)
    assert stopped is not None and newest.name == manifests.folder_name(int(stopped[1]))

    # A truncated file: the run resumes from the previous checkpoint, with one warning.
    victim = max(
        (newest / name for name in manifests.read_manifest(newest).files),
        key=lambda p: p.stat().st_size,
    )
    os.truncate(victim, victim.stat().st_size - 1)
    before = manifests.complete_iterations(save)[-2]
    with started(*words) as process:
        output = wait_for(process, f" iteration {before + 1:8d}/")
        assert f"resuming from {save / manifests.folder_name(before)}" in output
        ranks = ranks_of(process.pid)
        second = next(p for p in ranks if p.environ().get("RANK") == "1")
        second.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode == 1
        assert_exited(ranks)
        assert errors.count("warning: damaged checkpoint") == 1 and victim.name in errors
        assert "rank 1 was killed by SIGKILL" in errors and "Traceback" not in errors

    with started(*words) as process:
        wait_for(process, " iteration ")
        ranks = ranks_of(process.pid)
        process.send_signal(signal.SIGINT)  # requests a stop
        time.sleep(1.1)  # sooner it would count as the same one
        process.send_signal(signal.SIGINT)  # ends immediately
        _, errors = process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode in (130, 3) and "Traceback" not in errors
        assert_exited(ranks)

    with started(*words) as process:
        wait_for(process, " iteration ")
        ranks = ranks_of(process.pid)
        process.kill()
        assert_exited(ranks)


def test_single_process(folder, tmp_path):
    """Asynchronous saves and data workers import ``pretrain_gpt.py`` again."""
    save = tmp_path / "run"
    words = ["--train-iters", "4", "--tensorboard-dir", tmp_path / "events", "--num-workers", "2"]
    words += ["--save", save, "--exit-interval", "2", "--lr-decay-iters", "4"]
    words = arguments("laptop-gpt2", folder / "folds.yaml", *words)
    first = pretrain_in_new_interpreter(*words)
    assert first.returncode == 3, first.stderr
    assert "stopped at iteration 2" in first.stdout
    assert assert_whole(save).name == "iter_0000002"
    second = pretrain_in_new_interpreter(*words)
    assert second.returncode == 0, second.stderr
    assert f"resuming from {save / 'iter_0000002'}" in second.stdout
    assert assert_whole(save).name == "iter_0000004"
    assert list(history(save)) == [1, 2, 3, 4]
    assert list(history(save, "validation/valid")) == [4]
    assert list((tmp_path / "events").glob("events*"))
    for output in (first, second):
        assert "Traceback" not in output.stderr and "error" not in output.stderr


def test_errors_are_printed_once(folder):
    """With several ranks, each user error is printed once."""
    wrong = arguments("laptop-llama", folder / "none.yaml")
    for extra in ([], ["--nproc-per-node", "2"]):
        result = pretrain(*wrong, *extra)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.count("error: ") == 1 and len(result.stderr.splitlines()) == 1
