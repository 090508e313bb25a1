"""run_status --watch in a terminal: a pseudo terminal is read while the program runs."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_llmjp.formatting import text_width
from megatron_llmjp.report.live.loss_samples import SAMPLE_BYTES, sample_losses
from megatron_llmjp.report.live.screen import ENTER, LEAVE
from megatron_llmjp.report.live.sparkline import ASCII, BLOCKS, sparkline
from tests.support.processes import ROOT
from tests.support.timeouts import TIMEOUT


def record(iteration: int, loss: float | None) -> str:
    return json.dumps({"iteration": iteration, "lm loss": loss, "fold": "日本語"}) + "\n"


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    text = "".join(record(i, loss) for i, loss in enumerate(losses, 1))
    (folder / "metrics.jsonl").write_text(text)
    return folder


class Terminal:
    """A program in a pseudo terminal."""

    def __init__(self, *words: object, columns: int, rows: int, term: str = "xterm") -> None:
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            time.sleep(0.2)  # until the size is set
            environment = {**os.environ, "TERM": term, "PYTHONPATH": str(ROOT)}
            program = [sys.executable, "-m", "data_tools.run_status", *map(str, words)]
            os.execve(sys.executable, program, environment)
        self.output = ""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size; the program notices without a signal handler of its own."""
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def read_until(self, is_done: Callable[[str], bool]) -> str:
        """Read until the output since the last call fulfils a condition or the program ends."""
        new, end = b"", time.monotonic() + TIMEOUT
        while time.monotonic() < end and not is_done(new.decode(errors="ignore")):
            if select.select([self._terminal], [], [], 0.05)[0]:
                try:
                    data = os.read(self._terminal, 65536)
                except OSError:  # the program has ended
                    break
                if not data:
                    break
                new += data
        self.output += new.decode()
        return new.decode()

    def press_control_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def end(self) -> int:
        """Read the rest and return the exit code."""
        self.read_until(lambda _: False)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def frames(output: str) -> list[list[str]]:
    """Return the lines of each redrawn screen."""
    parts = output.partition(LEAVE)[0].split("\x1b[H")[1:]
    return [part.partition("\x1b[J")[0].replace("\x1b[K", "").split("\r\n") for part in parts]


def test_redrawn_in_place_resized_and_restored(tmp_path):
    save = write_run(tmp_path / "run", [6.0 - i / 100 for i in range(100)])
    terminal = Terminal(save, "--watch", "0.3", columns=70, rows=24)
    terminal.read_until(lambda text: text.count("\x1b[J") >= 2)
    with (save / "metrics.jsonl").open("a") as file:
        file.write(record(101, 1.25))
    terminal.read_until(lambda text: "1.2500" in text)
    terminal.resize(32, 8)
    small = terminal.read_until(lambda text: text.count("\x1b[J") >= 2)
    terminal.press_control_c()
    assert terminal.end() == 3  # stopped: the run has no process
    output = terminal.output
    assert output.startswith(ENTER) and output.count(ENTER) == output.count(LEAVE) == 1
    assert "Traceback" not in output and "\x1b[2J" not in output
    first, last = frames(output)[0], frames(small)[-1]
    assert all(text_width(line) < 70 for line in first) and len(first) <= 24
    assert any("loss, iterations 1 to 100" in line for line in first)
    assert any("█" in line for line in first) and "Ctrl-C to end" in first[-2]
    assert all(text_width(line) < 32 for line in last) and len(last) <= 8
    final = output.partition(LEAVE)[2]
    assert (
        "loss         1.2500" in final and "Ctrl-C to end" not in final and "\x1b" not in final[3:]
    )


def test_a_killed_view_restores_the_terminal(tmp_path):
    save = write_run(tmp_path / "run", [3.0, 2.0])
    terminal = Terminal(save, save, "--watch", columns=90, rows=24)
    terminal.read_until(lambda text: "\x1b[J" in text)
    os.kill(terminal.process, signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    assert terminal.output.count(LEAVE) == 1
    assert len(re.findall(r"run +█▁ 2\.0000", frames(terminal.output)[0][-5:].__repr__())) == 2


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    save = write_run(tmp_path / "run", [3.0, 2.0])
    terminal = Terminal(save, "--watch", "9", columns=90, rows=24, term="dumb")
    terminal.read_until(lambda text: "loss" in text)
    terminal.press_control_c()
    assert terminal.end() == 3 and "\x1b" not in terminal.output


def test_sparklines():
    assert sparkline([0.0, 7.0], 9) == ["▁█"]
    assert sparkline([float(i) for i in range(8)], 8) == ["▁▂▃▄▅▆▇█"]
    assert sparkline([0.0, 1.0, 2.0, 3.0], 2) == ["▁█"]  # means of 0.5 and 2.5
    assert sparkline([0.0, 15.0], 2, rows=2) == [" █", "▁█"]
    assert sparkline([5.0, 5.0], 2) == ["▄▄"] and sparkline([], 5) == []
    dropped = [1000.0, *[2.0 - i / 100 for i in range(99)]]
    assert sparkline(dropped, 100)[0][:2] == "██" and len(set(sparkline(dropped, 100)[0])) == 8
    assert sparkline([0.0, 7.0], 2, blocks=ASCII) == [".@"] and len(ASCII) == len(BLOCKS)


def test_samples_of_short_and_long_runs(tmp_path):
    folder = write_run(tmp_path / "short", [5.0, 4.0, 3.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "start", "iteration": 1}\n' + record(2, 4.5) + record(3, None))
        file.write(record(4, 3.5) + '{"iteration": 5, "lm lo')
    assert sample_losses(folder) == [(1, 5.0), (2, 4.5), (4, 3.5)]
    long = write_run(tmp_path / "long", [10.0 - i / 10_000 for i in range(60_000)])
    assert (long / "metrics.jsonl").stat().st_size > 100 * SAMPLE_BYTES
    points = sample_losses(long, 100)
    assert len(points) == 100 and points[0] == (1, 10.0) and points[-1][0] == 60_000
    assert all(loss == 10.0 - (iteration - 1) / 10_000 for iteration, loss in points)
    gaps = [b[0] - a[0] for a, b in pairwise(points)]
    assert max(gaps) < 900 and sample_losses(tmp_path) == []


@pytest.mark.parametrize("words", [["--watch", "SAVE"]])
def test_a_folder_after_watch(words, capsys):
    from data_tools.run_status import main

    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "SAVE: expected a number of seconds above 0" in capsys.readouterr().err
