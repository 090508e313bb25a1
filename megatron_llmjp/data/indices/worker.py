"""Building indices in a process beside a rank.

A rank in a process group cannot do it itself: megatron-core builds on the first rank only, and a
thread would hold the interpreter while numpy shuffles. The child is a fresh interpreter, as a
process with CUDA or threads must not fork.

The child reads pickled jobs from its standard input and ends when that is closed, so it never
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
_POLITENESS = 10


def build_in_subprocess(index: CachedIndex, temporary: Path) -> None:
    """Write an index into a folder, from a process of its own; returns when it is done.

    Raises:
        RuntimeError: the process failed; it has told why on standard error.
    """
    child = _start(partial(index.build, temporary))
    code = child.wait()
    if child.stdin:
        child.stdin.close()
    if code:
        raise RuntimeError(f"{index.folder}: building the index failed (exit code {code})")


def build_in_background(indices: Sequence[CachedIndex]) -> subprocess.Popen[bytes]:
    """Begin to make all of these, at low priority."""
    return _start(partial(ensure_indices, list(indices)))


def _start(job: Callable[[], None]) -> subprocess.Popen[bytes]:
    root = str(Path(megatron_llmjp.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Neither a GPU's memory nor all cores: the rank needs them.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, env=environment
    )
    written = pickle.dumps(job)
    assert child.stdin is not None
    child.stdin.write(_SIZE.pack(len(written)) + written)
    child.stdin.flush()
    return child


def main() -> None:
    """Do the job on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the child without a word
    os.nice(_POLITENESS)
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
