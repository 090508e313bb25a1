"""Objects in S3 and compatible object stores: s3://, through s3fs.

Credentials, region and endpoint are those of botocore (``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ...) and fsspec (``FSSPEC_S3_ANON=true`` for public buckets).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from data_tools.preprocess.input.remote.addresses import shown
from data_tools.preprocess.input.remote.files import (
    ByteStream,
    ReceivedBytes,
    RemoteFile,
    Store,
    missing_package,
    receive,
    run_until,
)

SCHEME = "s3://"


class S3Store(Store):
    """Objects in buckets."""

    access_hint = (
        "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket set "
        "FSSPEC_S3_ANON=true."
    )

    def __init__(self, address: str) -> None:
        """Open the store.

        Raises:
            UserError: s3fs is not installed.
        """
        super().__init__()
        try:
            import fsspec
            import s3fs  # noqa: F401
        except ImportError as error:
            raise missing_package(shown(address), "s3fs") from error
        self._files = fsspec.filesystem("s3", skip_instance_cache=True)

    def find(self, address: str) -> RemoteFile | None:
        """Return an object; None for a prefix."""
        path = address.partition("://")[2]
        found = self._request(shown(address), lambda: self._files.info(path))
        return None if found["type"] == "directory" else self._file(found)

    def files_below(self, address: str) -> list[RemoteFile]:
        """Return the objects below a prefix."""
        path = address.partition("://")[2].rstrip("/")
        found = self._request(shown(address), lambda: self._files.find(path, detail=True))
        return [self._file(info) for _, info in sorted(found.items()) if _is_object(info)]

    def matches(self, pattern: str) -> tuple[list[RemoteFile], list[str]]:
        """Return the objects and prefixes that match a pattern."""
        path = pattern.partition("://")[2]
        found = self._request(shown(pattern), lambda: self._files.glob(path, detail=True))
        files = [self._file(info) for _, info in sorted(found.items()) if _is_object(info)]
        folders = [name for name, info in sorted(found.items()) if info["type"] == "directory"]
        return files, [SCHEME + name for name in folders]

    def stream(
        self, file: RemoteFile, start: int, end: int, closing: threading.Event
    ) -> ByteStream:
        """Request a range of an object."""
        request = self._receive_range(file, start, end)
        found: ByteStream = run_until(self._files.loop, request, closing)
        return found

    async def _receive_range(self, file: RemoteFile, start: int, end: int) -> ReceivedBytes:
        bucket, key, _ = self._files.split_path(file.path)
        response = await self._files._call_s3(  # fsspec's name of the coroutine of call_s3
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}"
        )
        total = response.get("ContentRange", "").rpartition("/")[2]
        body = response["Body"]
        try:
            file.refuse_other_version(int(total) if total.isdecimal() else None, _version(response))
            return await receive(body, end - start)
        finally:
            body.close()

    def _file(self, info: Mapping[str, Any]) -> RemoteFile:
        return RemoteFile(SCHEME + info["name"], info["name"], info["size"], _version(info), self)


def _is_object(info: Mapping[str, Any]) -> bool:
    """Return whether this is an object with contents, and not the marker of a folder."""
    return info["type"] == "file" and not info["name"].endswith("/")


def _version(info: Mapping[str, Any]) -> str | None:
    tag = info.get("ETag")
    return str(tag).strip('"') if tag else None
