"""Subprocess of a rank that builds sample indices.

A rank within a process group cannot build indices itself: megatron-core builds only on the first
rank, and a thread would hold the interpreter lock while numpy shuffles. The child is a new
interpreter, because a process with CUDA or threads must not fork.

The child reads a pickled job from its standard input and exits when that is closed, so it never
outlives the rank.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import megatron_llmjp
from megatron_llmjp.data.indices.index_cache import CachedIndex, ensure_indices

_SIZE = struct.Struct("<Q")
_NICENESS = 10


def build_in_subprocess(index: CachedIndex, temporary: Path) -> None:
    """Write an index into a folder in a subprocess, and wait for it.

    Raises:
        RuntimeError: the subprocess failed; its standard error has the cause.
    """
    with start_job(partial(index.build, temporary)) as child:
        code = child.wait()  # it ends early when its standard input is closed
    if code:
        raise RuntimeError(f"{index.folder}: building the index failed (exit code {code})")


def build_in_background(indices: Sequence[CachedIndex]) -> subprocess.Popen[bytes]:
    """Start building the missing ones of these indices at low priority, and return."""
    return start_job(partial(ensure_indices, list(indices)))


def start_job(job: Callable[[], None], stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a picklable function in a new interpreter, at low priority and without a GPU."""
    root = str(Path(megatron_llmjp.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Leave the GPU memory and the cores to the rank.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=stdout, env=environment
    )
    written = pickle.dumps(job)
    assert child.stdin is not None
    child.stdin.write(_SIZE.pack(len(written)) + written)
    child.stdin.flush()
    return child


def main() -> None:
    """Run the job that is read from standard input."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the child without a traceback
    os.nice(_NICENESS)
    stream = sys.stdin.buffer
    (size,) = _SIZE.unpack(stream.read(_SIZE.size))
    written = stream.read(size)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pickle.loads(written)()


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the other end is closed
    os._exit(1)


if __name__ == "__main__":
    main()
