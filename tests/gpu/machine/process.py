"""Processes on the machine, forked from one that has loaded the library, torch and megatron-core.

pytest's own process has loaded torch without the library, so that the machine needs another one; it
is started at the first call and ends with pytest's.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.gpu.machine.library import compile_library
from tests.support.forks import ROOT, STAND_INS, become_program, import_name, run_to_exit
from tests.support.timeouts import PROCESS_TIMEOUT

IMPORTED = ("megatron_llmjp.training.train", "torch.utils.data._utils")
"""Modules that the forked processes share."""
_PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def run_on_machine(function: Callable[..., Any], *arguments: Any, stand_ins: bool = False) -> Any:
    """Run ``function(machine, *arguments)`` on the machine, in a forked process.

    Args:
        function: a function of a module; its first argument is the :class:`Machine`.
        arguments: JSON values.
        stand_ins: whether the packages of :data:`tests.support.forks.STAND_INS` are installed.

    Returns:
        The function's result, a JSON value.

    Raises:
        AssertionError: the function raised; the message is its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        for stream in ("stdout", "stderr"):
            (Path(folder) / stream).touch()
        call = [*import_name(function), arguments]
        request = {"folder": folder, "env": dict(os.environ), "call": call}
        code = _server(stand_ins).run(json.dumps(request))
        if code != 0:
            error = (Path(folder) / "stderr").read_text(errors="replace")
            raise AssertionError(f"{function.__qualname__}, exit code {code}:\n{error[-6000:]}")
        return json.loads((Path(folder) / "result").read_text())


class _Server:
    """The process that others are forked from."""

    def __init__(self, stand_ins: bool) -> None:
        path = [str(STAND_INS)] if stand_ins else []
        path += filter(None, [os.environ.get("PYTHONPATH")])
        library = compile_library(ROOT / ".pytest_cache" / "fake_cuda")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({str(library)!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        atexit.register(self.close)

    def run(self, request: str) -> int:
        """Return the exit code of a forked process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(PROCESS_TIMEOUT, self._process.kill)
        late.start()
        try:
            print(request, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            assert answer, f"the machine has ended:\n{self._error_output()}"
            return int(answer)
        finally:
            late.cancel()

    def _error_output(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-6000:]

    def close(self) -> None:
        """End the process; forked ones have ended."""
        self._process.kill()
        self._process.wait()


@lru_cache
def _server(stand_ins: bool) -> _Server:
    return _Server(stand_ins)


def serve(library: str) -> None:
    """Answer each line of standard input, a call, by the exit code of the process that runs it."""
    _die_with_parent()
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before torch: it replaces one of its functions
    from tests.gpu.machine.rank import become_machine

    machine = become_machine()
    for name in IMPORTED:
        importlib.import_module(name)

    def run(module: str, name: str, arguments: list[Any], result: Path) -> None:
        function = getattr(importlib.import_module(module), name)
        with machine.running():
            returned = function(machine, *arguments)
        result.write_text(json.dumps(returned))

    gc.freeze()  # collections in the forked processes look at their own objects only
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            become_program(request["folder"], request["env"], str(ROOT))
            run_to_exit(run, *request["call"], Path(request["folder"]) / "result")
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, also if that was killed; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
