"""An ordered map over worker processes that neither runs ahead without bound nor hangs."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from data_tools.preprocess.blocks import Block, LongLine
from data_tools.preprocess.encode import BlockEncoder, EncodedBlock

AHEAD = 4  # blocks in flight per worker: enough to keep it busy, few enough for flat memory


class EncoderPool:
    """Worker processes that encode blocks; used as a context manager.

    ProcessPoolExecutor rather than multiprocessing.Pool: it notices a worker that was killed
    (for memory, say) and raises BrokenProcessPool, where Pool waits forever.
    """

    def __init__(self, workers: int, encoder: BlockEncoder) -> None:
        self.workers = workers
        # fork: workers share the loaded tokenizer and start in milliseconds.
        self._executor = ProcessPoolExecutor(
            workers, get_context("fork"), initializer=_start, initargs=(encoder, os.getpid())
        )

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def encode(
        self, blocks: Iterable[tuple[Any, Block]]
    ) -> Iterator[tuple[Any, Block, EncodedBlock]]:
        """Yield each block with what its worker made of it, in the order given."""
        waiting: deque[tuple[Any, Block, Future[EncodedBlock] | None]] = deque()
        for tag, block in blocks:
            future = None
            if not isinstance(block.payload, LongLine):
                future = self._executor.submit(_encode, block.payload)
            waiting.append((tag, block, future))
            # A long line must be dealt with before the next block is read.
            while waiting and (len(waiting) >= AHEAD * self.workers or future is None):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(
    entry: tuple[Any, Block, Future[EncodedBlock] | None],
) -> tuple[Any, Block, EncodedBlock]:
    tag, block, future = entry
    return tag, block, EncodedBlock(lines=1) if future is None else future.result()


_encoder: BlockEncoder | None = None  # per worker process, set once by _start


def _start(encoder: BlockEncoder, parent: int) -> None:
    """Prepare a worker: Ctrl-C is the parent's business, and without a parent it ends."""
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what the parent made need not be looked at again
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(payload: Any) -> EncodedBlock:
    assert _encoder is not None
    return _encoder.encode(payload)
