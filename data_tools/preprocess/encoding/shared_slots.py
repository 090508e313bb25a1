"""Memory through which the main process passes text to workers.

A pipe would copy each block several times in pieces of 64 KiB, which costs more than decompression.
"""

from __future__ import annotations

import mmap
import pickle
from dataclasses import dataclass
from typing import Any

SLOT_BYTES = 4 << 20
"""Size of a slot; the system provides memory for the used part only."""


@dataclass(frozen=True)
class SharedPayload:
    """The payload of a block as it is sent to a worker.

    Attributes:
        pickled: the payload, without its buffers if they are in a slot.
        ranges: start and end of each buffer in the shared memory.
    """

    pickled: bytes
    ranges: tuple[tuple[int, int], ...] = ()


class SharedSlots:
    """Slots in memory that processes forked later share."""

    def __init__(self, count: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, count * SLOT_BYTES))

    def put(self, slot: int, payload: Any) -> SharedPayload:
        """Copy the buffers of a payload to a slot, which no worker may be using."""
        buffers: list[pickle.PickleBuffer] = []
        wrapped = pickle.PickleBuffer(payload) if isinstance(payload, bytes) else payload
        pickled = pickle.dumps(wrapped, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        if sum(map(len, views)) > SLOT_BYTES:
            return SharedPayload(pickle.dumps(payload, protocol=5))
        ranges, at = [], slot * SLOT_BYTES
        for view in views:
            self._memory[at : at + len(view)] = view
            ranges.append((at, at + len(view)))
            at += len(view)
        return SharedPayload(pickled, tuple(ranges))

    def get(self, shared: SharedPayload) -> Any:
        """Return the payload; bytes are copied, so that the slot may be used again."""
        buffers = [bytes(self._memory[start:end]) for start, end in shared.ranges]
        return pickle.loads(shared.pickled, buffers=buffers)
