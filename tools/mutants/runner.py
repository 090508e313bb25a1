"""Tests of one mutant in a process forked from one that has imported everything else.

Each mutant has two processes. One runs pytest; the other waits for it, kills it after a time limit,
and kills all processes that the tests have left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tools.mutants import hook
from tools.mutants.operators import Mutant
from tools.mutants.recording import ROOT

IMPORTED = (
    "numpy", "torch", "torch.distributed.checkpoint", "torch.utils.data", "transformers",
    "megatron.core.distributed", "megatron.core.dist_checkpointing", "megatron.core.optimizer",
    "megatron.core.datasets.gpt_dataset", "megatron.core.models.gpt", "pyarrow", "tokenizers",
    "sentencepiece", "pydantic", "yaml", "hypothesis", "matplotlib.pyplot", "safetensors.torch",
)  # fmt: skip
"""Modules shared by all mutants: nothing of this project, and no test."""
SURVIVED, KILLED, TIMEOUT, ERROR = "survived", "killed", "timeout", "error"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Outcome:
    """What the tests of a mutant found."""

    state: str
    """``survived``, ``killed``, ``timeout``, or ``error`` when no test was run."""
    by: str = ""
    """The test that failed."""
    ran: int = 0
    seconds: float = 0.0
    tests: list[str] = field(default_factory=list)


def warm_up() -> None:
    """Import the modules of :data:`IMPORTED`, in the environment of the tests."""
    sys.path.insert(0, str(ROOT))
    importlib.import_module("tests.conftest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)


class Runner:
    """Runs the tests of several mutants at once.

    Args:
        parallel: processes at once.
        done: called with the key and the outcome of each.
        show: print the output of pytest.
    """

    def __init__(
        self, parallel: int, done: Callable[[Any, Outcome], None], show: bool = False
    ) -> None:
        self._parallel, self._done, self._show = parallel, done, show
        self._running: dict[int, tuple[Any, Path, list[str], float]] = {}

    def start(self, key: Any, mutant: Mutant | None, tests: list[str], limit: float) -> None:
        """Run tests on a mutant, or on the original for None; waits for a free place."""
        while len(self._running) >= self._parallel:
            self.wait()
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _supervise(folder, mutant, tests, limit, self._show)
                code = 0
            finally:
                os._exit(code)
        self._running[pid] = (key, folder, tests, time.monotonic())

    def wait(self) -> None:
        """Wait for one of the running mutants."""
        pid, _ = os.wait()
        key, folder, tests, start = self._running.pop(pid)
        try:
            found = json.loads((folder / "result.json").read_text())
        except (OSError, ValueError):
            found = {"state": ERROR}
        shutil.rmtree(folder, ignore_errors=True)
        self._done(key, Outcome(**found, seconds=time.monotonic() - start, tests=tests))

    def finish(self) -> None:
        """Wait for all."""
        while self._running:
            self.wait()

    def kill(self) -> None:
        """Kill what is running."""
        for pid, (_, folder, _, _) in self._running.items():
            os.kill(pid, signal.SIGTERM)  # it kills its descendants
            os.waitpid(pid, 0)
            shutil.rmtree(folder, ignore_errors=True)


def _supervise(
    folder: Path, mutant: Mutant | None, tests: list[str], limit: float, show: bool
) -> None:
    """Run pytest in a child process, and write ``result.json`` in the folder."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become its children
    os.setsid()
    signal.signal(signal.SIGTERM, _end)
    pid = os.fork()
    if pid == 0:
        _be_pytest(folder, mutant, tests, limit, show)
    end, code = time.monotonic() + limit, None
    while code is None and time.monotonic() < end:
        time.sleep(0.05)
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
    _kill_descendants(psutil.Process())
    report = folder / "report.json"
    found = json.loads(report.read_text()) if report.exists() else {"by": "", "ran": 0}
    states = {None: TIMEOUT, 0: SURVIVED, 4: ERROR, 5: ERROR}
    found["state"] = KILLED if found["by"] else states.get(code, KILLED)
    (folder / "result.json").write_text(json.dumps(found))


def _end(*_: object) -> None:
    _kill_descendants(psutil.Process())
    os._exit(0)


def _kill_descendants(process: psutil.Process) -> None:
    """Kill all processes below this one, again until none is left."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = process.children(recursive=True)
        if not children:
            return
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        time.sleep(0.01)


def _be_pytest(
    folder: Path, mutant: Mutant | None, tests: list[str], limit: float, show: bool
) -> None:
    code = 3
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not show:
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
        os.chdir(ROOT)
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        if mutant is not None:
            source = mutant.source((ROOT / mutant.path).read_bytes()).decode()
            name = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            content = {"name": name, "path": str(ROOT / mutant.path), "source": source}
            file = folder / "mutant.json"
            file.write_text(json.dumps(content))
            hook.install(file)
            hook.install_in_programs(file, ROOT)
        _fork_the_fork_server()
        flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "--hypothesis-seed=0"]
        flags += [f"--basetemp={folder / 'base'}", f"--timeout={limit / 2}"]
        files = dict.fromkeys(test.split("::")[0] for test in tests)
        code = int(pytest.main([*flags, *files], plugins=[_Selection(tests, folder)]))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


class _Selection:
    """A pytest plugin that runs the given tests in their order, and reports the first failure."""

    def __init__(self, tests: Sequence[str], folder: Path) -> None:
        self._order = {test: number for number, test in enumerate(tests)}
        self._folder, self._by, self._ran = folder, "", 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._order]
        items.sort(key=lambda item: self._order[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._ran += report.when == "call"
        if report.failed:
            self._failed(report.nodeid)

    def _failed(self, by: str) -> None:
        self._by = self._by or by

    def pytest_sessionfinish(self) -> None:
        content = {"by": self._by, "ran": self._ran}
        (self._folder / "report.json").write_text(json.dumps(content))


def _fork_the_fork_server() -> None:
    """Let ``multiprocessing`` start its fork server by a fork of this process as it is now.

    It would otherwise be a new interpreter, without the mutant, that imports torch again. The
    process that becomes the server waits until it is needed.
    """
    main = types.ModuleType("__main__")  # else each process would import this program
    main.__spec__ = None
    sys.modules["__main__"] = main
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        _become_the_fork_server(there)
    there.close()
    start = multiprocessing.util.spawnv_passfds

    def spawn(path: Any, args: list[Any], passfds: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in str(args[-1]):
            return int(start(path, args, passfds))
        content = json.dumps([args[-1], list(passfds)]).encode()
        socket.send_fds(here, [content], list(passfds))
        return pid

    multiprocessing.util.spawnv_passfds = spawn  # type: ignore[assignment]


def _become_the_fork_server(requests: socket.socket) -> None:
    try:
        content, received, _, _ = socket.recv_fds(requests, 1 << 20, 8)
        if content:
            requests.close()
            code, numbers = json.loads(content)
            # The code names the descriptors by their numbers in the process that sent them.
            spare = [_move(fd, 500 + i) for i, fd in enumerate(received)]
            for fd, number in zip(spare, numbers, strict=True):
                _move(fd, number)
                os.set_inheritable(number, True)
            exec(code, {})
    finally:
        os._exit(0)


def _move(fd: int, number: int) -> int:
    os.dup2(fd, number)
    os.close(fd)
    return number
