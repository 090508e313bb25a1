"""Key-value store that the nodes share during the preflight check, with a limit on every wait."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL_SECONDS = 0.05


class StoreError(Exception):
    """The store cannot be reached, or a value did not appear in time."""


class SharedStore:
    """Values of all nodes by key, served by the first node.

    Args:
        address: host and port of the server.
        seconds: longest wait for the server.
        serve: whether this process is the server.

    Raises:
        StoreError: the server does not answer, or cannot listen on the port.
    """

    def __init__(self, address: tuple[str, int], seconds: float, serve: bool = False) -> None:
        try:
            # Without wait_for_workers: a node that does not answer must not stop the others.
            self._store = dist.TCPStore(
                *address,
                is_master=serve,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except RuntimeError as error:
            verb = "listen on" if serve else "reach"
            reason = str(error).splitlines()[0]
            raise StoreError(f"cannot {verb} {address[0]} port {address[1]}: {reason}") from None

    def put(self, key: str, value: Any) -> None:
        """Set a value, serializable as JSON."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise _lost(error) from None

    def find(self, key: str) -> Any:
        """Return a value; None if it is not set."""
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except RuntimeError as error:
            raise _lost(error) from None

    def get(self, key: str, seconds: float) -> Any:
        """Wait for a value.

        Raises:
            StoreError: it is not set within this time.
        """
        end = time.monotonic() + seconds
        while (value := self.find(key)) is None:
            if time.monotonic() > end:
                raise StoreError(f"the first node did not continue within {seconds:.0f} s")
            time.sleep(_POLL_SECONDS)
        return value

    def collect(self, prefix: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """Return the values of all ranks that set ``PREFIX/RANK`` within a time."""
        end, found, missing = time.monotonic() + seconds, {}, list(ranks)
        while True:
            for rank in list(missing):
                if (value := self.find(f"{prefix}/{rank}")) is not None:
                    found[rank] = value
                    missing.remove(rank)
            if not missing or time.monotonic() > end:
                return found
            time.sleep(_POLL_SECONDS)


def _lost(error: RuntimeError) -> StoreError:
    return StoreError(f"the connection to the first node is lost: {str(error).splitlines()[0]}")
