"""A local webhook that answers, refuses or never answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "T0/B0/secret"


class Webhook:
    """An HTTP server in a thread; use it as a context manager."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        """JSON objects of the requests, also of those without an answer yet."""
        self.answered = 0
        self.status = 200
        self.before_answer: Callable[[], object] = lambda: None
        """Called in the server's thread for each request before it is answered."""
        self._changed = threading.Condition()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook._receive(json.loads(body))
                webhook.before_answer()
                try:
                    self.send_response(webhook.status)
                    self.end_headers()
                except OSError:  # the client has given up
                    return
                with webhook._changed:
                    webhook.answered += 1
                    webhook._changed.notify_all()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/{SECRET}"

    def __enter__(self) -> Webhook:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def events(self) -> list[str]:
        return [alert["event"] for alert in self.received]

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition on the requests is true."""
        with self._changed:
            return self._changed.wait_for(condition, seconds)

    def _receive(self, alert: dict[str, Any]) -> None:
        with self._changed:
            self.received.append(alert)
            self._changed.notify_all()
