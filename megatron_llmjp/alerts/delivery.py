"""Delivery of one alert within a time limit: attempts, then a warning.

The JSON object has the keys ``event``, ``message``, ``time``, ``text`` (the line that chat services
display) and ``status`` (what ``run_status --json`` prints for the run, or null).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_llmjp.alerts.destinations import Destinations
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn
from megatron_llmjp.report.status import read_status, status_json

Event = Literal["end", "stop", "crash", "hang", "spike", "exclusion"]

ATTEMPT_SECONDS = 10.0
"""Longest wait for each answer of a webhook, and for a command."""
LIMIT_SECONDS = 30.0
"""Longest duration of all attempts to deliver an alert."""
PAUSES = (0.0, 2.0, 5.0)
"""Seconds before each attempt."""


@dataclass(frozen=True)
class Alert:
    """An event of a run."""

    event: Event
    message: str
    save: str | None
    """The save folder, whose status is part of the alert."""


def deliver(
    alert: Alert,
    destinations: Destinations,
    limit: float = LIMIT_SECONDS,
    pauses: Sequence[float] = PAUSES,
    report: Callable[[str], None] = warn,
) -> bool:
    """Send an alert to all destinations, and wait at most ``limit`` seconds.

    Args:
        alert: the alert.
        destinations: where it is sent to.
        limit: seconds; a file system or server that does not respond may take longer, and is left
            to a thread that ends with the process.
        pauses: seconds before each attempt.
        report: receives a warning if the alert is dropped, without the URL.

    Returns:
        Whether all destinations have received it.
    """
    problems: list[str] = []
    done = threading.Event()

    def attempt() -> None:
        try:
            problems.extend(_deliver(alert, destinations, pauses))
        except Exception as error:  # an alert must never end a run
            problems.append(type(error).__name__)
        done.set()

    threading.Thread(target=attempt, name="alert", daemon=True).start()
    if not done.wait(limit):
        problems.append(f"not delivered within {limit:g} s")
    if problems:
        report(f"alert '{alert.event}' was dropped: {'; '.join(problems)}")
    return not problems


def _deliver(alert: Alert, destinations: Destinations, pauses: Sequence[float]) -> list[str]:
    """Return the problems of destinations that have not received the alert."""
    body = json.dumps(alert_json(alert), ensure_ascii=False).encode(errors="replace")
    problems = []
    if destinations.webhook:
        problem = _retry(lambda: _post(destinations.webhook or "", body), pauses)
        problems += [f"{destinations.webhook_name}: {problem}"] if problem else []
    if destinations.command:
        problem = _run(destinations.command, body, alert)
        problems += [f"--alert-command: {problem}"] if problem else []
    return problems


def alert_json(alert: Alert) -> dict[str, Any]:
    """Return the JSON object of an alert."""
    name = Path(alert.save).resolve().name if alert.save else "run"
    status: dict[str, Any] | None = None
    if alert.save:
        with contextlib.suppress(UserError, OSError):
            status = status_json(read_status(Path(alert.save)))
    return {
        "event": alert.event,
        "message": alert.message,
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "text": f"{name}: {alert.event}: {alert.message}",
        "status": status,
    }


def _retry(action: Callable[[], str], pauses: Sequence[float]) -> str:
    problem = ""
    for pause in pauses:
        time.sleep(pause)
        problem = action()
        if not problem:
            break
    return problem


def _post(url: str, body: bytes) -> str:
    """Send a POST request; return a problem without the URL, or nothing."""
    if not url.startswith(("http://", "https://")):
        return "expected a URL that starts with https:// or http://"
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "megatron_llmjp"}
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        with urllib.request.urlopen(request, timeout=ATTEMPT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or type(error.reason).__name__)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__


def _run(command: str, body: bytes, alert: Alert) -> str:
    """Run the command with the alert on its standard input; return a problem, or nothing."""
    env = {**os.environ, "ALERT_EVENT": alert.event, "ALERT_MESSAGE": alert.message}
    # Its own session, so that processes that it started are killed with it.
    process = subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=subprocess.PIPE, env=env, start_new_session=True
    )
    try:
        process.communicate(body, ATTEMPT_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"killed after {ATTEMPT_SECONDS:g} s"
    return f"exit code {process.returncode}" if process.returncode else ""
