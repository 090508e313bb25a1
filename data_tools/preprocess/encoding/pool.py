"""Pool of worker processes that encode blocks.

The pool is an ordered map with bounded read-ahead that detects killed workers.
"""

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

from data_tools.preprocess.encoding.encode import BlockEncoder, EncodedBlock
from data_tools.preprocess.encoding.shared_slots import SharedPayload, SharedSlots
from data_tools.preprocess.input.blocks import Block, LongLine

BLOCKS_IN_FLIGHT = 4  # per worker: keeps it busy while limiting memory


class EncoderPool:
    """Worker processes that encode blocks; a context manager.

    Uses ProcessPoolExecutor because it raises BrokenProcessPool if a worker is killed, for example
    when it runs out of memory; multiprocessing.Pool would wait forever.
    """

    def __init__(self, workers: int, encoder: BlockEncoder) -> None:
        self.capacity = BLOCKS_IN_FLIGHT * workers
        self._slots = SharedSlots(self.capacity)
        # fork: workers share the loaded tokenizer and start in milliseconds.
        self._executor = ProcessPoolExecutor(
            workers,
            get_context("fork"),
            initializer=_init_worker,
            initargs=(encoder, self._slots, os.getpid()),
        )
        self._executor.submit(os.getpid)  # forks now, before a remote reader starts threads

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def encode(
        self, blocks: Iterable[tuple[Any, Block]]
    ) -> Iterator[tuple[Any, Block, EncodedBlock]]:
        """Yield each block with its encoding, in the input order."""
        waiting: deque[tuple[Any, Block, Future[EncodedBlock] | None]] = deque()
        for number, (tag, block) in enumerate(blocks):
            future = None
            if not isinstance(block.payload, LongLine):
                # The results of all blocks that used this slot before were returned.
                shared = self._slots.put(number % self.capacity, block.payload)
                future = self._executor.submit(_encode, shared)
            waiting.append((tag, block, future))
            # A long line must be consumed before the next block is read.
            while waiting and (len(waiting) >= self.capacity or future is None):
                yield _wait_for_result(waiting.popleft())
        while waiting:
            yield _wait_for_result(waiting.popleft())


def _wait_for_result(
    entry: tuple[Any, Block, Future[EncodedBlock] | None],
) -> tuple[Any, Block, EncodedBlock]:
    tag, block, future = entry
    return tag, block, EncodedBlock(lines=1) if future is None else future.result()


# Per worker process, set once by _init_worker.
_encoder: BlockEncoder | None = None
_slots: SharedSlots | None = None


def _init_worker(encoder: BlockEncoder, slots: SharedSlots, parent: int) -> None:
    """Initialize a worker: ignore Ctrl-C, which the parent handles, and exit with the parent."""
    global _encoder, _slots
    _encoder, _slots = encoder, slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # exclude objects inherited from the parent from garbage collection
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers already run in parallel
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(shared: SharedPayload) -> EncodedBlock:
    assert _encoder is not None and _slots is not None
    return _encoder.encode(_slots.get(shared))
