"""The alert at the end of a run's processes, by whoever knows how they ended.

A rank that is killed cannot report it. The alert is therefore sent by what started the ranks and
waits for them: the job script (``slurm/alert.py``) or the local launcher. Only where the ranks were
started otherwise, as by torchrun, the first rank sends it itself, and a kill is not reported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_llmjp.alerts.delivery import LIMIT_SECONDS, Alert, Event, deliver
from megatron_llmjp.alerts.destinations import find_destinations
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEUE, UserError
from megatron_llmjp.parallel.ranks import LOCAL_LAUNCHER
from megatron_llmjp.report.jobs import HANG_MESSAGE, HANG_REPORT
from megatron_llmjp.report.status import read_status

JOB_VARIABLE = "MEGATRON_LLMJP_ALERTS_BY_JOB"
"""Set by job scripts that send the alert at the end of the ranks."""
STATUS_SECONDS = 5.0
"""Time for reading the status of the run."""


def ranks_are_supervised(launcher: str, env: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher of the ranks, or the job, sends the alert at their end."""
    return launcher == LOCAL_LAUNCHER or bool(env.get(JOB_VARIABLE))


def hang_report_version(save: str | None) -> int | None:
    """Return what changes when the watchdog writes a report; None without a report."""
    try:
        return (Path(save or "") / HANG_REPORT).stat().st_mtime_ns
    except OSError:
        return None


def _never() -> bool:
    return False


def alert_end(
    config: Config, code: int, message: str = "", has_hung: Callable[[], bool] = _never
) -> None:
    """Send the alert at the end of a run's processes, and wait for its delivery.

    Nothing here can keep the caller, which may be about to end a run whose file system hangs.

    Args:
        config: the run's configuration.
        code: exit code of the ranks.
        message: the reason; by default that of the run's status.
        has_hung: returns whether the watchdog ended the run.
    """
    destinations = find_destinations(config.logging)
    if not destinations or config.training.eval_only:
        return
    save = config.checkpoint.save

    def send() -> None:
        state, why = read_state(Path(save)) if save is not None else ("", "")
        why = message or why or f"exit code {code}"
        deliver(Alert(end_event(code, state, why, has_hung()), why, save), destinations)

    thread = threading.Thread(target=send, name="alert at the end", daemon=True)
    thread.start()
    thread.join(LIMIT_SECONDS + STATUS_SECONDS)


def end_event(code: int, state: str, why: str, hung: bool = False) -> Event:
    """Return the event of an end with this exit code, state of the run and reason."""
    if code == EXIT_DONE:
        return "stop" if state == "stopped" else "end"
    if code in (EXIT_REQUEUE, EXIT_INTERRUPTED):
        return "stop"
    return "hang" if hung or HANG_MESSAGE in why else "crash"


def read_state(save: Path) -> tuple[str, str]:
    """Return the state of the run and its reason; empty if they cannot be read."""
    try:
        status = read_status(save)
    except (UserError, OSError):
        return "", ""
    return status.state, status.why
