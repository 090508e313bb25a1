"""Stop signals, and the start time of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from megatron_llmjp.parallel.ranks import START_TIME_VARIABLE, process_start_time, run_start_time
from megatron_llmjp.parallel.signals import STOP_SIGNALS, handled_signals


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(STOP_SIGNALS) - set(handled_signals()) == {signal.SIGHUP}
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert handled_signals() == STOP_SIGNALS
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_starts_with_its_launcher():
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = process_start_time(child.pid)
        assert before - 1.0 < started <= time.monotonic()
        child.communicate(b"\n")
    assert run_start_time({START_TIME_VARIABLE: "12.5"}) == 12.5
    own, parent = (process_start_time(number) for number in (os.getpid(), os.getppid()))
    assert abs(run_start_time({}) - own) < 0.5
    assert abs(run_start_time({"TORCHELASTIC_RUN_ID": "none"}) - parent) < 0.5
