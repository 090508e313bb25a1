"""Progress lines and bars, and messages and exit codes of the command-line programs."""

from __future__ import annotations

import errno
import io
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from data_tools import common
from data_tools.common import EncodingProgress, run_tool
from megatron_llmjp.errors import UserError


class Clock:
    """Replacement for ``time.monotonic``."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(common.time, "monotonic", clock)
    return clock


def test_rates_and_remaining_time(clock, capsys):
    """A resumed run, which has read 1 of 4 MB before."""
    progress = EncodingProgress(4_000_000, 1_000_000, None, 1000, 7_000_000)
    clock.now += 9.5
    progress.update(100, 5_000_000, 2_000_000, disk=1_500_000)
    assert capsys.readouterr().err == ""  # a line every ten seconds
    clock.now += 0.5
    progress.update(300, 15_000_000, 3_000_000, disk=2_000_000)
    assert capsys.readouterr().err == (
        "Processed 1,400 documents (40 docs/s, 2.00 MB/s, 0.50 M tokens/s), 12.00M tokens so far, "
        "50.0%, 0:00:20 left\n"
    )
    clock.now += 9
    progress.update(1, 0, 0, disk=2_000_001)
    assert capsys.readouterr().err == ""
    progress.close()


def test_a_line_every_n_documents_of_input_of_unknown_size(clock, capsys):
    progress = EncodingProgress(total=0, done=0, log_interval=250)
    clock.now += 3600
    progress.update(249, 10, 10, disk=0)
    assert capsys.readouterr().err == ""
    progress.update(1, 0, 0, disk=0)
    assert capsys.readouterr().err == (
        "Processed 250 documents (0 docs/s, 0.00 MB/s, 0.00 M tokens/s), 10 tokens so far\n"
    )


@pytest.mark.parametrize("total", [0, 2000])
def test_a_bar_on_a_terminal(clock, monkeypatch, total):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = EncodingProgress(total=total, done=500, log_interval=1)
    clock.now += 2
    progress.update(10, 4_000_000, 1_000_000, disk=1500)
    progress.close()
    text = terminal.getvalue()
    assert "10 docs, 5 docs/s, 2.0 MB/s, 0.50 Mtok/s, 1.00M tokens" in text
    assert ("75%|" in text) == bool(total)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x.jsonl: bad"), 2, "tool: x.jsonl: bad\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted; no incomplete output was left."),
        (BrokenProcessPool(), 1, "fewer --workers"),
        (OSError(errno.ENOSPC, "No space left on device", "o.bin"), 2,
         "tool: o.bin: No space left on device. Free some space"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "tool: Read-only file system. Choose"),
        (OSError(errno.EIO, "Input/output error", "o"), 2, "tool: o: Input/output error.\n"),
    ],
)  # fmt: skip
def test_errors_become_messages_and_exit_codes(capsys, error, code, message):
    def fail() -> int:
        raise error

    assert run_tool("tool", fail) == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_the_interrupt_of_a_resumable_program_says_so(capsys):
    def interrupt() -> int:
        raise KeyboardInterrupt

    assert run_tool("preprocess_data", interrupt) == 130
    assert "Run the same command to resume." in capsys.readouterr().err
