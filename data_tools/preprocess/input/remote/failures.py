"""Failures of remote reads: which are repeated, how long to wait, and what is printed.

The exceptions of aiohttp, botocore, requests and httpx are recognized by their attributes, so that
none of these libraries is imported here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TypeVar

from data_tools.preprocess.input.remote.addresses import scrub
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn

PAUSES = (0.2, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds between attempts, as long as no byte arrives."""
MAX_RETRY_AFTER = 300.0
"""Maximum of the seconds that a server may request by Retry-After."""

_TRANSIENT_STATUSES = frozenset({408, 425, 429})
_PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    NotImplementedError,
)
_CREDENTIAL_ERRORS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
    }
)
_PERMANENT_NAMES = _CREDENTIAL_ERRORS | {
    "NoRegionError",
    "InvalidRegionError",
    "ParamValidationError",
    "OfflineModeIsEnabled",
    "ClientConnectorCertificateError",
}
"""Errors of botocore, huggingface_hub and aiohttp; others without a status are of connections."""
_MAX_MESSAGE = 200

_Result = TypeVar("_Result")


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that caused an error, if there was one."""
    for found in _chain(error):
        response = getattr(found, "response", None)
        if isinstance(response, Mapping):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif response is not None:  # requests, httpx
            status = getattr(response, "status_code", None)
        else:  # aiohttp
            status = getattr(found, "status", None)
        if isinstance(status, int) and status >= 100:
            return status
    return None


def is_not_found(error: BaseException) -> bool:
    """Return whether the object does not exist."""
    status = status_of(error)
    return status == 404 or (status is None and isinstance(error, FileNotFoundError))


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUSES
    return not isinstance(error, _PERMANENT_ERRORS) and type(error).__name__ not in _PERMANENT_NAMES


def retry_after(error: BaseException) -> float:
    """Return the seconds that the server asks to wait, 0 if it does not."""
    for found in _chain(error):
        response = getattr(found, "response", None)
        if isinstance(response, Mapping):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(found if response is None else response, "headers", None)
        if headers is None or not hasattr(headers, "get"):
            continue
        value = headers.get("Retry-After") or headers.get("retry-after")
        if value:
            return min(max(_seconds(value), 0.0), MAX_RETRY_AFTER)
    return 0.0


def _seconds(value: str) -> float:
    """Return the seconds of a Retry-After header: a number, or an HTTP date (RFC 9110, 10.2.3)."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0


def describe(error: BaseException) -> str:
    """Return a description of an error in one line, without credentials."""
    status = status_of(error)
    if status is not None:
        try:
            return f"HTTP {status} {HTTPStatus(status).phrase}"
        except ValueError:
            return f"HTTP {status}"
    text = " ".join(scrub(str(error)).split())
    name = type(error).__name__
    return f"{name}: {text[:_MAX_MESSAGE]}" if text else name


class Attempts:
    """Attempts of one operation, which are repeated while they fail with transient errors."""

    def __init__(
        self,
        name: str,
        hint: str = "",
        closing: threading.Event | None = None,
        report: Callable[[str], None] = warn,
    ) -> None:
        """Create the attempts.

        Args:
            name: the address, as printed.
            hint: what to do if the access is denied.
            closing: ends the waiting; the last error is raised.
            report: receives a warning at the second failure.
        """
        self.name, self.hint = name, hint
        self._pauses: Sequence[float] = PAUSES
        self._report = report
        self._closing = closing or threading.Event()
        self._failed = 0

    def progress(self) -> None:
        """Count further failures from the beginning: data has arrived."""
        self._failed = 0

    def wait(self, error: Exception, place: str = "") -> None:
        """Wait after a failure until the next attempt.

        Args:
            error: the failure.
            place: where it happened, such as ``at byte 5``.

        Raises:
            UserError: the error is permanent, or attempts have failed for too long.
        """
        where = f" {place}" if place else ""
        if not is_transient(error):
            raise self._refusal(error, where) from None
        if self._failed >= len(self._pauses) or self._closing.is_set():
            raise UserError(
                f"{self.name}: cannot be read{where}: {describe(error)}, after "
                f"{self._failed + 1} attempts. Run the same command again to resume."
            ) from None
        seconds = self._pauses[self._failed] * random.uniform(0.75, 1.25)
        self._failed += 1
        if self._failed == 2:  # one failure is normal with long transfers
            patience = sum(self._pauses)
            self._report(f"{self.name}: {describe(error)}{where}; retrying for {patience:.0f} s")
        self._closing.wait(max(seconds, retry_after(error)))

    def _refusal(self, error: Exception, where: str) -> UserError:
        if is_not_found(error):
            return UserError(f"{self.name}: not found{where}")
        denied = isinstance(error, PermissionError) or status_of(error) in (401, 403)
        if denied or type(error).__name__ in _CREDENTIAL_ERRORS:
            return UserError(f"{self.name}: access denied{where} ({describe(error)}). {self.hint}")
        return UserError(f"{self.name}: cannot be read{where}: {describe(error)}")


def with_retries(action: Callable[[], _Result], attempts: Attempts) -> _Result:
    """Return the result of an action, which is repeated while it fails with transient errors.

    Raises:
        UserError: the error is permanent or persists; errors of missing objects included.
    """
    while True:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # of any of the libraries
            attempts.wait(error)
