"""Files in repositories of the Hugging Face Hub: hf://, through huggingface_hub.

The revision is resolved to a commit when the program starts, so that files cannot change while they
are read. The names that are recorded have the revision as given.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from typing import Any

from data_tools.preprocess.input.remote.addresses import shown
from data_tools.preprocess.input.remote.files import ByteStream, RemoteFile, Store, missing_package
from megatron_llmjp.errors import UserError

_PREFIXES = {"dataset": "datasets/", "space": "spaces/", "model": ""}


class HubStore(Store):
    """Files in repositories."""

    access_hint = (
        "Set HF_TOKEN or run `hf auth login`; gated repositories require accepting their terms."
    )

    def __init__(self, address: str) -> None:
        """Open the store.

        Raises:
            UserError: huggingface_hub is not installed, or this is a storage bucket.
        """
        super().__init__()
        try:
            import fsspec
            import huggingface_hub
        except ImportError as error:
            raise missing_package(shown(address), "huggingface_hub") from error
        self._files = fsspec.filesystem("hf", skip_instance_cache=True)
        self._api = huggingface_hub.HfApi(endpoint=self._files.endpoint)
        self._commits: dict[tuple[str, str, str], str] = {}

    def find(self, address: str) -> RemoteFile | None:
        """Return a file; None for a folder or a repository."""
        root, pinned, path = self._pin(address)
        found = self._request(
            shown(address), lambda: self._files.info("/".join(filter(None, [pinned, path])))
        )
        return None if found["type"] == "directory" else self._file(found, root, pinned)

    def files_below(self, address: str) -> list[RemoteFile]:
        """Return the files in a folder or a repository."""
        root, pinned, path = self._pin(address)
        place = "/".join(filter(None, [pinned, path]))
        found = self._request(shown(address), lambda: self._files.find(place, detail=True))
        return [self._file(info, root, pinned) for _, info in sorted(found.items())]

    def matches(self, pattern: str) -> tuple[list[RemoteFile], list[str]]:
        """Return the files and folders that match a pattern."""
        root, pinned, path = self._pin(pattern)
        found = self._request(
            shown(pattern), lambda: self._files.glob(f"{pinned}/{path}", detail=True)
        )
        entries = [info for _, info in sorted(found.items())]
        files = [self._file(info, root, pinned) for info in entries if info["type"] == "file"]
        folders = [
            root + info["name"].removeprefix(pinned)
            for info in entries
            if info["type"] == "directory"
        ]
        return files, folders

    def stream(
        self, file: RemoteFile, start: int, end: int, closing: threading.Event
    ) -> ByteStream:
        """Request a range of a file."""
        with self._files.open(file.path, "rb", cache_type="none") as opened:
            opened.seek(start)
            data = opened.read(end - start)
        if len(data) > end - start:
            raise ConnectionError("the server ignored the byte range")
        return io.BytesIO(data)

    def _pin(self, address: str) -> tuple[str, str, str]:
        """Return the address of a repository as given, its path at a commit, and the path in it.

        Raises:
            UserError: there is no such repository or revision, or the access is denied.
        """
        name, word = shown(address), address.rstrip("/")
        if word.startswith("hf://buckets/"):
            raise UserError(f"--input {name}: storage buckets of the Hub are not supported")
        try:
            found = self._request(name, lambda: self._files.resolve_path(word))
            kind, repository, revision = found.repo_type, found.repo_id, found.revision
            key = (kind, repository, revision)
            if key not in self._commits:
                self._commits[key] = self._request(
                    name,
                    lambda: self._api.repo_info(repository, repo_type=kind, revision=revision).sha,
                )
        except FileNotFoundError:
            raise UserError(
                f"--input {name}: no such repository or revision on the Hub, or no access to it. "
                f"{self.access_hint}"
            ) from None
        path = found.path_in_repo
        root = word.removesuffix(path).rstrip("/") if path else word
        return root, f"{_PREFIXES[kind]}{repository}@{self._commits[key]}", path

    def _file(self, info: Mapping[str, Any], root: str, pinned: str) -> RemoteFile:
        name = root + info["name"].removeprefix(pinned)
        return RemoteFile(name, info["name"], info["size"], _version(info), self)


def _version(info: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of a large file, the git hash of a small one."""
    large = info.get("lfs")
    tag = large["sha256"] if large else info.get("blob_id")
    return str(tag) if tag else None
