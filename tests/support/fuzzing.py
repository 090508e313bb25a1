"""Fuzz tests of parsers: damaged and hostile inputs, in a forked process with limits.

A :class:`Target` is a parser and a valid input of it. A parser must accept an input or refuse it
with a user error that names the file: any other exception, a crash, a hang, or memory far beyond
the size of the input is a failure. Case ``n`` of a target is the same on every machine, and the
failing inputs are kept.

``FUZZ_EXAMPLES=50`` tries 50 times as many random cases, ``FUZZ_SEED=1`` others.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.errors import EXIT_USER_ERROR, DataError, UserError
from tests.support.forks import ROOT, Fork
from tests.support.fuzzing_mutators import DEEP, HOSTILE, mutated_bytes
from tests.support.timeouts import PROCESS_TIMEOUT, TIMEOUT

EXAMPLES = float(os.environ.get("FUZZ_EXAMPLES", "1"))
SEED = os.environ.get("FUZZ_SEED", "0")

MEMORY = 128 << 20
"""Bytes that a parser may use above the memory before, in addition to ``MEMORY_FACTOR``."""
MEMORY_FACTOR = 64
"""Bytes that a parser may use per byte of its input."""
ADDRESS_SPACE = 4 << 30
"""Bytes of additional address space, to protect the machine."""
CPU_SECONDS = TIMEOUT / 10
"""CPU time after which a case counts as a hang."""
MAX_LINE = 4000
"""Characters of a line of a message."""
MAX_FAILURES = 12
"""Distinct failures after which a target ends."""

Mutator = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A parser and its input.

    Attributes:
        make: writes a valid input into an existing empty folder and returns the file to change.
        parse: reads the input, given the path of that file.
        mutators: each returns a changed content of the file; one is drawn for each case.
        hostile: contents that are always tried, given the valid content.
        examples: number of random cases, before the multiplication by ``FUZZ_EXAMPLES``.
        names: a pattern that a message must contain; by default the file's name.
        errors: exceptions that refuse an input.
        common: number of the contents in HOSTILE and DEEP that are tried; by default all.
        with_folder: whether a folder in place of the file is tried too.
    """

    make: Callable[[Path], Path]
    parse: Callable[[Path], object]
    mutators: tuple[Mutator, ...] = (mutated_bytes,)
    hostile: Callable[[bytes], Iterable[bytes]] = lambda _: ()
    examples: int = 150
    names: str | None = None
    errors: tuple[type[Exception], ...] = (UserError, DataError)
    with_folder: bool = True
    common: int | None = None


def fuzz(targets: Mapping[str, Target], name: str, folder: Path) -> None:
    """Try all cases of one of the calling module's ``TARGETS`` in a forked process.

    Raises:
        AssertionError: a case failed, or the process crashed or hangs.
    """
    caller = Path(inspect.stack()[1].filename)
    module = ".".join(caller.resolve().relative_to(ROOT).with_suffix("").parts)
    process = Fork(_fuzz_in_fork, module, name, str(folder))
    try:
        code = process.wait(PROCESS_TIMEOUT * max(1.0, EXAMPLES))
    finally:
        process.kill_all()
    last = (folder / "case").read_text() if (folder / "case").exists() else "before the first case"
    sys.stdout.write(process.stdout[-3000:])
    assert code == 0, f"{name}, exit code {code} at {last}:\n{process.stderr[-12000:]}"


def _fuzz_in_fork(module: str, name: str, folder: str) -> None:
    targets = importlib.import_module(module).TARGETS
    _Fuzzer(name, targets[name], Path(folder)).run()


class Hang(BaseException):
    """A case used too much CPU time."""


class _Fuzzer:
    """The cases of one target; changes the state of its process."""

    def __init__(self, name: str, target: Target, folder: Path) -> None:
        self._name, self._target, self._folder = name, target, folder
        (folder / "input").mkdir(parents=True)
        self._file = target.make(folder / "input")
        self._valid = self._file.read_bytes()
        self._failures: dict[str, str] = {}
        self._slowest = (0.0, "")
        self._most = (0, "")

    def run(self) -> None:
        """Try all cases; raise if one failed."""
        signal.signal(signal.SIGPROF, _raise_hang)
        self._try("the valid input", self._valid)
        assert not self._failures, next(iter(self._failures.values()))
        size = _status_kib("VmSize") * 1024 + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        started, count = time.process_time(), 0
        for label, content in self._cases():
            self._try(label, content)
            count += 1
            if len(self._failures) == MAX_FAILURES:
                break
        if self._target.with_folder:
            self._replace_by_folder()
        print(
            f"{self._name}: {count} cases in {time.process_time() - started:.1f} s; slowest "
            f"{self._slowest[0]:.2f} s ({self._slowest[1]}), most memory "
            f"{self._most[0] >> 20} MiB ({self._most[1]})"
        )
        assert not self._failures, "\n\n".join(self._failures.values())

    def _cases(self) -> Iterator[tuple[str, bytes]]:
        common = (*HOSTILE, *DEEP)[: self._target.common]
        for number, content in enumerate([*common, *self._target.hostile(self._valid)]):
            yield f"hostile {number}", content
        for number in range(int(self._target.examples * EXAMPLES)):
            generator = random.Random(f"{self._name}/{SEED}/{number}")
            mutator = generator.choice(self._target.mutators)
            content = mutator(self._valid, generator)
            while generator.random() < 0.25:
                content = mutated_bytes(content, generator)
            yield f"{getattr(mutator, '__name__', 'mutator')} {number}", content

    def _replace_by_folder(self) -> None:
        self._file.unlink()
        self._file.mkdir()
        self._attempt("a folder in place of the file", b"")

    def _try(self, label: str, content: bytes) -> None:
        if self._file.is_dir():
            shutil.rmtree(self._file)
        self._file.write_bytes(content)
        (self._folder / "case").write_text(label)
        self._attempt(label, content)

    def _attempt(self, label: str, content: bytes) -> None:
        limit = MEMORY + MEMORY_FACTOR * len(content)
        problem, memory = self._measure(label)
        if problem is None and memory > limit:
            # Arrow's allocator sometimes takes new memory for each thread; a real excess repeats.
            problem, memory = self._measure(label)
        self._most = max(self._most, (memory, label))
        if problem is None and memory > limit:
            problem = ("memory", f"{memory >> 20} MiB for {len(content):,} bytes")
        if problem is not None and problem[0] not in self._failures:
            kept = self._folder / f"failure{len(self._failures)}"
            kept.write_bytes(content)
            self._failures[problem[0]] = (
                f"{self._name}, {label} (FUZZ_SEED={SEED}), kept in {kept}:\n{problem[1]}"
            )

    def _measure(self, label: str) -> tuple[tuple[str, str] | None, int]:
        """Parse the current input; return the problem and the bytes of memory added."""
        before, started = _reset_peak(), time.process_time()
        problem = self._problem(label == "the valid input")
        seconds, memory = time.process_time() - started, (_status_kib("VmHWM") - before) * 1024
        self._slowest = max(self._slowest, (seconds, label))
        return problem, memory

    def _problem(self, is_valid: bool) -> tuple[str, str] | None:
        """Parse the current input; return a key and a description of what is wrong."""
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            self._target.parse(self._file)
        except self._target.errors as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            wrong = "refused" if is_valid else self._message_problem(error)
            return wrong and (f"{wrong} {_origin(error)}", f"{wrong}:\n{_trace(error)}")
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            return f"{type(error).__name__} {_origin(error)}", _trace(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return None

    def _message_problem(self, error: Exception) -> str | None:
        message, name = str(error), re.escape(self._file.name)
        if not re.search(self._target.names or name, message):
            return f"the message does not name {self._file.name}"
        if max(map(len, message.splitlines())) > MAX_LINE:
            return "a line of the message is too long"
        if "Traceback" in message:
            return "the message contains a traceback"
        return "memory ran out" if isinstance(_root(error), MemoryError) else None


def run_main(main: Callable[[list[str]], int], *words: str | Path) -> str:
    """Run a program in this process and return its standard output.

    Raises:
        UserError: it exited with code 2; with its standard error.
        AssertionError: it exited with another code, or printed a traceback.
    """
    # Strict, like the standard output of a process: text that is not UTF-8 is an error.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", e) for e in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        for stream in (out, err):
            stream.flush()
    printed, errors = (s.buffer.getvalue().decode() for s in (out, err))  # type: ignore[attr-defined]
    assert "Traceback" not in errors, errors
    if code == EXIT_USER_ERROR:
        raise UserError(errors)
    assert code == 0, f"exit code {code}: {errors}"
    return printed


def _raise_hang(_: int, frame: types.FrameType | None) -> None:
    raise Hang(f"more than {CPU_SECONDS:.0f} s of CPU time")


def _root(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _origin(error: BaseException) -> str:
    """Return the innermost line of this project that raised an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-12))[-5000:]


def _status_kib(field: str) -> int:
    """Return a memory size of this process, from /proc."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def _reset_peak() -> int:
    """Reset the peak of the resident memory; return it in KiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmHWM")
