"""Remote files, and the interface of the stores that they are read from."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_tools.preprocess.input.remote.failures import Attempts, is_not_found, with_retries
from megatron_llmjp.errors import UserError

SECONDS_BETWEEN_CHECKS = 0.5
"""Time after which a request is cancelled whose result is no longer needed."""


class ByteStream(Protocol):
    """Bytes of one response. If the connection breaks, all bytes before are returned first."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes, b"" at the end."""

    def close(self) -> None:
        """Discard the rest."""


@dataclass(frozen=True)
class RemoteFile:
    """A remote file as it was when the program started.

    Attributes:
        name: the address without credentials, as it is printed and recorded.
        path: the address for the store; it may contain credentials.
        size: size in bytes.
        version: what changes with the contents: an ETag, a hash or a modification time; None if the
            server gives none of these.
        store: where it is read from.
        has_ranges: the server returns byte ranges; otherwise it is read from the beginning only.
        is_pinned: every read returns this version or fails.
    """

    name: str
    path: str = field(repr=False)
    size: int
    version: str | None
    store: Store = field(repr=False, compare=False)
    has_ranges: bool = True
    is_pinned: bool = True

    def refuse_other_version(self, size: int | None, version: str | None) -> None:
        """Raise UserError if the file has another size or version now; None is unknown."""
        same_size = size is None or size == self.size
        if same_size and (None in (version, self.version) or version == self.version):
            return
        raise UserError(
            f"{self.name}: the remote file changed while it was being read ("
            f"{describe_version(self.size, self.version)} at the start, "
            f"{describe_version(size, version)} now). Wait until nobody writes to it, then give "
            "--overwrite to start from the beginning."
        )

    def require_ranges(self, subject: str) -> None:
        """Raise UserError if the server does not return byte ranges."""
        if not self.has_ranges:
            raise UserError(
                f"{self.name}: {subject} are read at several places, but the server ignores byte "
                "ranges. Download the file first."
            )

    def refuse_changed(self) -> None:
        """Raise UserError if the file was changed since the start of the program."""
        if not self.is_pinned:
            now = self.store.find(self.path)
            if now is not None:
                self.refuse_other_version(now.size, now.version)


def describe_version(size: int | None, version: str | None) -> str:
    """Return the size and version of a file, for messages."""
    parts = [] if size is None else [f"{size:,} bytes"]
    return ", ".join([*parts, "no version" if version is None else f"version {version}"])


class Store(ABC):
    """Files of one scheme. All methods may raise UserError, none another error of a library."""

    can_list: bool = True
    """Whether folders and patterns can be expanded."""
    access_hint: str = ""
    """What to do if access is denied."""

    def __init__(self) -> None:
        self.heads: dict[str, bytes] = {}
        """First bytes of files that were read for their format, by path."""

    @abstractmethod
    def find(self, address: str) -> RemoteFile | None:
        """Return a file; None if the address is a folder.

        Raises:
            FileNotFoundError: there is neither a file nor a folder.
        """

    @abstractmethod
    def files_below(self, address: str) -> list[RemoteFile]:
        """Return all files in a folder and its subfolders, sorted by name."""

    @abstractmethod
    def matches(self, pattern: str) -> tuple[list[RemoteFile], list[str]]:
        """Return the files that match a glob pattern, and the addresses of matching folders."""

    @abstractmethod
    def stream(
        self, file: RemoteFile, start: int, end: int, closing: threading.Event
    ) -> ByteStream:
        """Request the bytes ``[start, end)`` of a file. Errors are those of the library.

        Args:
            file: the file.
            start, end: the range.
            closing: ends the request: its result is no longer needed.
        """

    def _request(self, name: str, action: Callable[[], Any]) -> Any:
        """Return the result of a request at the start of the program, which may be repeated.

        Raises:
            FileNotFoundError: there is no such object.
            UserError: the request fails otherwise.
        """

        def attempt() -> Any:
            try:
                return action()
            except Exception as error:  # of any of the libraries
                if is_not_found(error):
                    return None
                raise

        found = with_retries(attempt, Attempts(name, self.access_hint))
        if found is None:
            raise FileNotFoundError(name)
        return found


class ReceivedBytes:
    """What was received of one response, and the error that ended it, if any."""

    def __init__(self, parts: list[bytes], error: Exception | None) -> None:
        self._data, self._error = io.BytesIO(b"".join(parts)), error

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes, b"" at the end."""
        data = self._data.read(size)
        if not data and self._error is not None:
            raise self._error
        return data

    def close(self) -> None:
        """Free the memory."""
        self._data.close()


def run_until(loop: Any, coroutine: Coroutine[Any, Any, Any], closing: threading.Event) -> Any:
    """Return the result of a coroutine in fsspec's event loop; ``closing`` cancels it.

    Raises:
        ConnectionAbortedError: it was cancelled.
    """
    running = asyncio.run_coroutine_threadsafe(coroutine, loop)
    while True:
        done, _ = concurrent.futures.wait([running], SECONDS_BETWEEN_CHECKS)
        if done:
            return running.result()
        if closing.is_set():
            running.cancel()
            raise ConnectionAbortedError("the file was closed")


async def receive(body: Any, size: int) -> ReceivedBytes:
    """Read at most ``size`` bytes of a response.

    It must run in the event loop of the connection from the request on: when a connection breaks,
    aiohttp discards data that nobody has read yet.

    Args:
        body: aiohttp's or aiobotocore's response body.
        size: maximum number of bytes.
    """
    parts: list[bytes] = []
    left = size
    try:
        while left and (data := await body.read(left)):
            parts.append(data)
            left -= len(data)
    except Exception as error:  # of either library
        return ReceivedBytes(parts, error)
    return ReceivedBytes(parts, None)


def missing_package(name: str, package: str) -> UserError:
    """Return the error of an address whose package is not installed."""
    return UserError(
        f"--input {name}: reading it requires the package {package}: pip install {package}"
    )
