"""Files on web servers: https:// and http://.

fsspec's session sends the requests. Its file with random access is not used: it neither compares
the versions of its responses nor keeps the data received before a connection broke. Compressed
transfers (``Content-Encoding``) are not decoded, because byte ranges, sizes and versions refer to
the bytes transferred; files are decompressed by their contents.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

from data_tools.preprocess.input.remote.addresses import encode_url, shown
from data_tools.preprocess.input.remote.failures import status_of
from data_tools.preprocess.input.remote.files import (
    ByteStream,
    ReceivedBytes,
    RemoteFile,
    Store,
    missing_package,
    receive,
    run_until,
)
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn

SECONDS_WITHOUT_DATA = 30
"""Time without data after which a connection counts as broken."""
BUFFER_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")
"""RFC 9110, section 14.4."""


class HttpStore(Store):
    """Files on web servers, which cannot list folders."""

    can_list = False
    access_hint = (
        "Write the user and password of the server to ~/.netrc or into the address, or get a new "
        "signed address if this one has expired."
    )

    def __init__(self, address: str) -> None:
        """Open the store.

        Raises:
            UserError: aiohttp is not installed.
        """
        super().__init__()
        try:
            import aiohttp
            import fsspec
        except ImportError as error:
            raise missing_package(shown(address), "aiohttp") from error
        self._files = fsspec.filesystem(
            "https",
            encoded=True,
            skip_instance_cache=True,
            client_kwargs={
                "auto_decompress": False,
                "headers": {"Accept-Encoding": "identity"},
                "read_bufsize": BUFFER_BYTES,
                "timeout": aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=SECONDS_WITHOUT_DATA,
                    sock_read=SECONDS_WITHOUT_DATA,
                ),
                "trust_env": True,  # proxies and ~/.netrc
            },
        )
        self._has_warned = False

    def find(self, address: str) -> RemoteFile:
        """Return the file, with the size and version that the server states."""
        path, name = encode_url(address), shown(address)
        from fsspec.asyn import sync

        found = self._request(name, lambda: sync(self._files.loop, self._probe, path))
        status, size, version = found
        if size is None:
            raise UserError(
                f"--input {name}: the server does not state the size of the file, without which a "
                "truncated transfer is not noticed. Download the file first."
            )
        if version is None and not self._has_warned:
            self._has_warned = True
            warn(
                f"{name}: the server sends neither ETag nor Last-Modified: a change of the file is "
                "noticed only if its size changes"
            )
        return RemoteFile(
            name, path, size, version, self, has_ranges=status == 206, is_pinned=False
        )

    def files_below(self, address: str) -> list[RemoteFile]:
        """Refuse: web servers have no folders."""
        raise _not_listable(address)

    def matches(self, pattern: str) -> tuple[list[RemoteFile], list[str]]:
        """Refuse: web servers have no folders."""
        raise _not_listable(pattern)

    def stream(
        self, file: RemoteFile, start: int, end: int, closing: threading.Event
    ) -> ByteStream:
        """Request a range of a file, or all of it if the server has no ranges."""
        request = self._receive_range if file.has_ranges else self._start_response
        found: ByteStream = run_until(self._files.loop, request(file, start, end), closing)
        return found

    async def _receive_range(self, file: RemoteFile, start: int, end: int) -> ReceivedBytes:
        response = await self._get(file.path, {"Range": f"bytes={start}-{end - 1}"})
        async with response:
            _check_response(file, response.status, response.headers, start, end)
            return await receive(response.content, end - start)

    async def _start_response(self, file: RemoteFile, start: int, end: int) -> _Response:
        response = await self._get(file.path, {})
        try:
            _check_response(file, response.status, response.headers, start, end)
        except BaseException:
            response.close()
            raise
        return _Response(response, self._files.loop)

    async def _get(self, path: str, headers: Mapping[str, str]) -> Any:
        """Send a GET request; return aiohttp's response.

        Raises:
            aiohttp.ClientError: the request fails, or its status is an error.
        """
        session = await self._files.set_session()
        response = await session.get(self._files.encode_url(path), headers=dict(headers))
        response.raise_for_status()
        return response

    async def _probe(self, path: str) -> tuple[int, int | None, str | None]:
        """Request the first byte; return the status, the size of the file and its version.

        A GET instead of a HEAD request, which signed addresses do not allow, and which does not
        show whether the server returns ranges.
        """
        try:
            response = await self._get(path, {"Range": "bytes=0-0"})
        except Exception as error:  # of aiohttp
            if status_of(error) != 416:
                raise
            if _total_size(416, getattr(error, "headers", None) or {}) == 0:
                return 206, 0, _version(getattr(error, "headers", None) or {})
            response = await self._get(path, {})
        status, headers = response.status, response.headers
        if status == 206:
            await response.read()  # keeps the connection
        response.close()
        return status, _total_size(status, headers), _version(headers)


class _Response:
    """A response that is read as data arrives."""

    def __init__(self, response: Any, loop: Any) -> None:
        self._response, self._loop = response, loop

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes, b"" at the end."""
        from fsspec.asyn import sync

        received: ReceivedBytes = sync(self._loop, receive, self._response.content, size)
        return received.read(size)

    def close(self) -> None:
        """Close the connection."""
        self._loop.call_soon_threadsafe(self._response.close)


def _check_response(
    file: RemoteFile, status: int, headers: Mapping[str, str], start: int, end: int
) -> None:
    """Check that a response is the requested range of the same version.

    Raises:
        UserError: the file has changed.
        ConnectionError: the range is another one.
    """
    file.refuse_other_version(_total_size(status, headers), _version(headers))
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "")) if status == 206 else None
    first = int(found[1] or 0) if found else 0
    if first != start or (status != 206 and file.has_ranges and end < file.size):
        raise ConnectionError(f"bytes from {start} were requested, the server sent {first}")


def _total_size(status: int, headers: Mapping[str, str]) -> int | None:
    """Return the size of the file that a response is a part of, if it is stated."""
    if status == 200:
        length = headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return int(found[2]) if found and found[2] != "*" else None


def _version(headers: Mapping[str, str]) -> str | None:
    """Return the ETag, else the modification time."""
    tag = headers.get("ETag") or headers.get("Last-Modified")
    return tag.removeprefix("W/").strip('"') if tag else None


def _not_listable(address: str) -> UserError:
    return UserError(
        f"--input {shown(address)}: web servers cannot list folders or expand patterns. Give the "
        "address of each file."
    )
