"""Processes forked from one that has imported torch and megatron-core.

Importing them takes four seconds, a fork a few milliseconds. A forked process is otherwise a new
one: own arguments, environment, working directory, session, output files and exit code, and modules
as they are right after their import.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import inspect
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tests.support.timeouts import PROCESS_TIMEOUT

ROOT = Path(__file__).resolve().parents[2]

IMPORTED = (
    "pytest",  # imported in the children, since the parent process is pytest
    "megatron_llmjp.cli",
    "megatron_llmjp.training.train",
    "megatron_llmjp.report.plots",
    "torch.utils.data._utils",
    "tests.support.training",
    "tests.support.warm",
)
"""Modules that forked processes share."""

STAND_INS = ROOT / "tests/support/stand_ins"
"""Packages that are not installed: Transformer Engine, computed by torch on a CPU."""


class Fork:
    """A forked process that runs a function, like :class:`subprocess.Popen`.

    With ``stand_ins`` the packages of :data:`STAND_INS` are installed in it. Its standard input is
    empty; standard output and standard error go to files, since an unread pipe would block it when
    full.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        stand_ins: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = dict(os.environ if env is None else env)
        self._process = warm_context().Process(
            target=_begin,
            args=(self._folder.name, environment, str(cwd), *import_name(function), arguments),
        )
        for name in ("stdout", "stderr"):
            (Path(self._folder.name) / name).touch()
        with _warm_process_with_stand_ins() if stand_ins else contextlib.nullcontext():
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        """Standard output so far."""
        return (Path(self._folder.name) / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error so far."""
        return (Path(self._folder.name) / "stderr").read_text(errors="replace")

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float = PROCESS_TIMEOUT) -> int:
        """Wait for the exit code; it is an error if the process runs for longer."""
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"still running:\n{self.stdout[-3000:]}{self.stderr[-3000:]}"
        return code

    def until(self, condition: Callable[[], object], pause: float = 0.001) -> bool:
        """Wait for a condition; return false if the process ended first."""
        end = time.monotonic() + PROCESS_TIMEOUT
        while not condition():
            if self.poll() is not None:
                return bool(condition())
            if time.monotonic() > end:
                raise AssertionError(f"timeout:\n{self.stdout[-3000:]}{self.stderr[-3000:]}")
            time.sleep(pause)
        return True

    def send_signal(self, number: int) -> None:
        """Send a signal to this process only."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_all(self) -> None:
        """``kill -9`` of the process and all its descendants."""
        if self.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                descendants = psutil.Process(self.pid).children(recursive=True)
                self.send_signal(signal.SIGKILL)
                for found in descendants:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.kill()
        self._process.join()


def run_program(
    *command: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = PROCESS_TIMEOUT,
) -> subprocess.CompletedProcess[str]:
    """Run a program of this project to its end, as ``python COMMAND`` does.

    Args:
        command: a script's path or ``-m MODULE``, and arguments.
        env: the environment; the one of this process by default.
        cwd: the working directory.
        timeout: seconds after which it is killed and the test fails.
    """
    words = [str(word) for word in command]
    program = Fork(be_program, words, env=env, cwd=cwd)
    try:
        code = program.wait(timeout)
    finally:
        program.kill_all()
    return subprocess.CompletedProcess(words, code, program.stdout, program.stderr)


def be_program(words: Sequence[str], in_rank: Callable[[], None] = lambda: None) -> None:
    """Run a program in this process; ranks that it launches are forked instead of started.

    Args:
        words: a script's path or ``-m MODULE``, and arguments.
        in_rank: called in every process that trains.
    """
    from megatron_llmjp.parallel import launcher

    def fork(command: Sequence[str], rank: int, world: int, port: int) -> _ForkedRank:
        env = launcher.rank_environment(rank, world, port)
        return _ForkedRank(command[1:], env, in_rank)

    launcher._start = fork  # type: ignore[assignment]
    if "--nproc-per-node" not in words:
        in_rank()
    _execute(words)


def _execute(words: Sequence[str]) -> None:
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.modules.pop(words[1], None)  # else runpy warns that it was imported before
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


class _ForkedRank:
    """Replacement for ``subprocess.Popen`` in the launcher."""

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], in_rank: Callable[[], None]
    ) -> None:
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            run_to_exit(_start_rank, words, env, in_rank)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def _start_rank(words: Sequence[str], env: Mapping[str, str], in_rank: Callable[[], None]) -> None:
    from megatron_llmjp.parallel.signals import handled_signals

    os.setsid()
    os.environ.update(env)
    for number in handled_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    in_rank()
    _execute(words)


@lru_cache(maxsize=1)
def warm_context() -> Any:
    """Return a multiprocessing context whose processes are forked from the warm one."""
    context = ForkServerContext()
    context.set_forkserver_preload(list(IMPORTED))
    return context


@lru_cache(maxsize=1)
def _server_with_stand_ins() -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["transformer_engine", "transformer_engine_torch", *IMPORTED])
    return server


@contextlib.contextmanager
def _warm_process_with_stand_ins() -> Iterator[None]:
    """Fork from another warm process: megatron-core looks for packages when it is imported."""
    before, path = forkserver.connect_to_new_process, os.environ.get("PYTHONPATH")
    forkserver.connect_to_new_process = _server_with_stand_ins().connect_to_new_process
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STAND_INS), path]))
    try:
        yield
    finally:
        forkserver.connect_to_new_process = before
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def import_name(function: Callable[..., object]) -> tuple[str, str]:
    """Return the module and name of a function; in pytest a test's module has a different name."""
    file = Path(inspect.getfile(function)).resolve().relative_to(ROOT)
    return ".".join(file.with_suffix("").parts), function.__qualname__


def _begin(
    folder: str,
    env: Mapping[str, str],
    cwd: str,
    module: str,
    name: str,
    arguments: Sequence[Any],
) -> None:
    """Set up the forked process and run the function in it."""
    become_program(folder, env, cwd)
    run_to_exit(lambda: getattr(importlib.import_module(module), name)(*arguments))


def become_program(folder: str, env: Mapping[str, str], cwd: str) -> None:
    """Give a forked process a session, environment, working directory and output files."""
    os.setsid()
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    _name_coverage(env.get("PYTEST_CURRENT_TEST"))


def _name_coverage(test: str | None) -> None:
    """Count the lines of this process for a test, if coverage is measured."""
    if test is not None and "coverage" in sys.modules:
        from coverage import Coverage

        if (measured := Coverage.current()) is not None:
            name, _, phase = test.rpartition(" ")
            measured.switch_context(f"{name}|{phase.strip('()')}".replace("|call", "|run"))


def run_to_exit(function: Callable[..., object], *arguments: Any) -> NoReturn:
    """Run a function and end the process as the interpreter ends a program."""
    code = 1
    try:
        try:
            function(*arguments)
            code = 0
        except SystemExit as exit_:
            if isinstance(exit_.code, str):
                print(exit_.code, file=sys.stderr)
            else:
                code = exit_.code or 0
        except KeyboardInterrupt:
            traceback.print_exc()
            code = 128 + signal.SIGINT
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
