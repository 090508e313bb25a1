"""A web server on localhost with byte ranges and ETags, whose faults are chosen by the test.

Only the standard library is used, so that it is independent of the client's library. Answers follow
RFC 9110 (206, Content-Range, 416, Retry-After).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        drop_after: the connection is closed after so many bytes of each response.
        drops: number of responses for which that happens.
        statuses: (status, headers) of the next answers.
        ignores_ranges: every answer is the whole file.
        without: headers that are not sent.
        headers: further headers.
        on_request: called before each answer with the number of the request.
    """

    drop_after: int | None = None
    drops: int = 1 << 30
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    ignores_ranges: bool = False
    without: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    on_request: Callable[[int], None] | None = None


@dataclass
class FileServer:
    """Files by path, faults, and a record of the requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    address: str = ""
    allows_head: bool = False
    """Signed addresses allow one method only."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path with query, and Range header of each request."""
    credentials: list[str] = field(default_factory=list)
    """Authorization headers."""
    sent: int = 0
    """Bytes of files sent."""
    lock: Lock = field(default_factory=Lock)


class _Handler(BaseHTTPRequestHandler):
    server_state: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        if self.server_state.allows_head:
            self.do_GET()
        else:
            self._answer(403, {}, b"")

    def do_GET(self) -> None:
        state, faults = self.server_state, self.server_state.faults
        with state.lock:
            state.requests.append((self.path, self.headers.get("Range", "")))
            state.credentials.append(self.headers.get("Authorization", ""))
            number = len(state.requests)
            status, headers = faults.statuses.pop(0) if faults.statuses else (200, {})
        if faults.on_request is not None:
            faults.on_request(number)
        if status != 200:
            self._answer(status, headers, b"")
            return
        data = state.files.get(self.path) or state.files.get(self.path.partition("?")[0])
        if data is None:
            self._answer(404, {}, b"")
            return
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and not faults.ignores_ranges:
            start, end = int(found[1]), min(int(found[2]) + 1, len(data))
            if start >= len(data):
                self._answer(416, headers | {"Content-Range": f"bytes */{len(data)}"}, b"")
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self._answer(206, headers, data[start:end])
        else:
            self._answer(200, headers, data)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        state, faults = self.server_state, self.server_state.faults
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers | faults.headers).items():
            if name not in faults.without:
                self.send_header(name, value)
        self.end_headers()
        with state.lock:
            limit = faults.drop_after
            is_dropped = limit is not None and len(body) > limit and faults.drops > 0
            if self.command == "HEAD":
                body, is_dropped = b"", False
            elif is_dropped:
                body = body[:limit]
                faults.drops -= 1
            state.sent += len(body)
        try:
            self.wfile.write(body)
        except OSError:  # the client has closed the connection
            is_dropped = True
        self.close_connection = is_dropped or "Content-Length" in faults.without


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients close connections."""


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Serve files on a free port of localhost."""
    state = FileServer()
    handler = type("Handler", (_Handler,), {"server_state": state})
    with _Server(("127.0.0.1", 0), handler) as server:
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
