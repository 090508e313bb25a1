"""Which signals stop a run, and when its time began."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from megatron_llmjp.parallel.ranks import STARTED_VARIABLE, process_started, run_started
from megatron_llmjp.parallel.signals import SIGNALS, handled


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(SIGNALS) - set(handled()) == {signal.SIGHUP}
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert handled() == SIGNALS
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_starts_with_its_launcher():
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = process_started(child.pid)
        assert before - 1.0 < started <= time.monotonic()
        child.communicate(b"\n")
    assert run_started({STARTED_VARIABLE: "12.5"}) == 12.5
    own, parent = (process_started(number) for number in (os.getpid(), os.getppid()))
    assert abs(run_started({}) - own) < 0.5
    assert abs(run_started({"TORCHELASTIC_RUN_ID": "none"}) - parent) < 0.5
