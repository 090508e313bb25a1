"""A stand-in for the Hugging Face Hub on localhost: the endpoints that an upload uses.

Its answers follow https://huggingface.co/docs/hub/api and the Git LFS batch API. Files become
visible with a commit only, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_test_token"
READ_ONLY_TOKEN = "hf_read_only"


@dataclass
class Repository:
    """A repository of the stand-in."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """Keys and paths of the operations of each commit."""


@dataclass
class Hub:
    """State of the stand-in."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Uploaded large files by SHA-256."""
    address: str = ""
    failing: str = ""
    """Requests whose path contains this text are answered with status 500."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self._is_refused():
            return
        if self.path == "/api/whoami-v2":
            self._answer({"type": "user", "name": "tester", "orgs": []})
            return
        name = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", self.path)
        found = self.hub.repositories.get(name[1]) if name else None
        if name is None or found is None:
            self._answer({"error": "Repository not found"}, 404, code="RepoNotFound")
            return
        siblings = [{"rfilename": path} for path in found.files]
        self._answer({"id": name[1], "private": found.private, "siblings": siblings, "sha": "0"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._is_refused(writes=True):
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [self._mode(file["path"]) for file in files]
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"objects": [self._action(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._commit(self.path.split("/")[3:5], body)
        else:
            self._answer({"error": f"not expected: {self.path}"}, 400)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_refused(with_token=False):
            return
        if self.path != f"/upload/{hashlib.sha256(data).hexdigest()}":
            self._answer({"error": "wrong content"}, 400)
            return
        self.hub.objects[self.path.removeprefix("/upload/")] = data
        self._answer({})

    def _is_refused(self, writes: bool = False, with_token: bool = True) -> bool:
        """Answer a request that fails, or lacks a token or its permission."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.hub.failing and self.hub.failing in self.path:
            self._answer({"error": "out of order"}, 500)
        elif with_token and token not in (TOKEN, READ_ONLY_TOKEN):
            self._answer({"error": "Invalid user token."}, 401)
        elif writes and token == READ_ONLY_TOKEN:
            self._answer({"error": "You don't have the rights to create a model"}, 403)
        else:
            return False
        return True

    def _create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'tester'}/{request['name']}"
        private = request.get("visibility") == "private" or request.get("private") is True
        self.hub.repositories[name] = Repository(private)
        self._answer({"url": f"{self.hub.address}/{name}"})

    def _mode(self, path: str) -> dict:
        is_large = path.endswith((".safetensors", ".png"))
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _action(self, found: dict) -> dict:
        href = f"{self.hub.address}/upload/{found['oid']}"
        return {**found, "actions": {"upload": {"href": href}}}

    def _commit(self, name: list[str], body: bytes) -> None:
        repository = self.hub.repositories["/".join(name)]
        operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append([o["key"] for o in operations])
        url = f"{self.hub.address}/{'/'.join(name)}/commit/{'1' * 40}"
        self._answer({"success": True, "commitUrl": url, "commitOid": "1" * 40})

    def _answer(self, content: dict, status: int = 200, code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a stand-in on a free port of localhost."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
