"""A PBS job as ``qstat -f`` prints it: its time limit, earlier runs, and the qsub of a successor.

PBS does not requeue a job that ends by itself: it submits the next one. The command line is the one
of the user, which PBS stores in the job, so that options unknown to this module are kept.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_llmjp.errors import EXIT_USER_ERROR, UserError

_OPTION = re.compile(r"-[A-Za-z]")
_DROPPED = "ahJv"
"""Options of one submission: start time, hold, array; ``-v`` is given by names instead."""


class PbsJob:
    """Attributes of a job.

    Args:
        text: output of ``qstat -f JOB``.
    """

    def __init__(self, text: str) -> None:
        lines = text.replace("\n\t", "").splitlines()
        pairs = (line.strip().partition(" = ") for line in lines if line.startswith("    "))
        self._attributes = {name: value for name, _, value in pairs}

    @property
    def runs(self) -> int:
        """Number of starts of this job, the present one included: PBS reruns it after node loss."""
        return int(self._attributes.get("run_count", 1))

    @property
    def seconds(self) -> int | None:
        """Time limit of the job in seconds; None without one."""
        limit = self._attributes.get("Resource_List.walltime")
        if limit is None:
            return None
        hours, minutes, seconds = (int(part) for part in limit.split(":"))
        return hours * 3600 + minutes * 60 + seconds

    @property
    def started(self) -> float:
        """Start time in seconds since the epoch; now if PBS does not have it yet.

        qstat and this process are in the same time zone, and ``ctime`` knows one language only.
        """
        start = self._attributes.get("stime")
        return time.mktime(time.strptime(start, "%a %b %d %H:%M:%S %Y")) if start else time.time()

    @property
    def variables(self) -> list[str]:
        """Names of the environment variables that the user passed with ``-v``."""
        pairs = re.split(r"(?<!\\),", self._attributes.get("Variable_List", ""))
        names = [pair.partition("=")[0] for pair in pairs]
        return [name for name in names if name and not name.startswith("PBS_O_")]

    def successor(self, command: Sequence[str]) -> list[str]:
        """Return the qsub command line of a job that continues this one.

        PBS joins the words of the submission by spaces. Options have none, except values of ``-v``,
        which are therefore taken from the environment.

        Args:
            command: program and arguments, for a job that was submitted with ``--``.

        Raises:
            UserError: PBS did not store the command line.
        """
        words = self._attributes.get("Submit_arguments", "").split()
        if "--" in words:
            options, program = words[: words.index("--")], ["--", *command]
        else:
            options, program = words[:-1], words[-1:]
        if not program or program[-1].startswith("-"):
            raise UserError("qstat -f has no Submit_arguments with which to submit the next job")
        return ["qsub", *self._options(options), *program]

    def _options(self, words: Sequence[str]) -> list[str]:
        kept, values, everything = [], [], False
        for word in words:
            if not _OPTION.match(word):
                values.append(word)
                continue
            kept += self._option(values)
            values, everything = [word], everything or word == "-V"
        kept += self._option(values)
        names = [] if everything else self.variables
        return [*kept, "-v", ",".join(names)] if names else kept

    def _option(self, words: Sequence[str]) -> list[str]:
        """Return an option with its value, or nothing if a successor must not have it."""
        if not words:
            return []
        letter, value = words[0][1], "".join([words[0][2:], *words[1:]])
        if letter in _DROPPED or (letter == "W" and value.startswith("depend=")):
            return []
        return list(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the job script asks for, or submit the next job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request", choices=("runs", "minutes", "submit"))
    parser.add_argument("--job", type=Path, required=True, help="file with the output of qstat -f")
    parser.add_argument("--margin", type=float, default=0.0, help="minutes kept for the last save")
    parser.epilog = "submit: -- PROGRAM ARGUMENTS..., as the job was started"
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, command = parser.parse_args(words[:end]), words[end + 1 :]
    job = PbsJob(args.job.read_text(encoding="utf-8", errors="replace"))
    try:
        if args.request == "runs":
            print(job.runs)
        elif args.request == "minutes":
            print(minutes_left(job, time.time(), args.margin))
        else:
            return submit(job.successor(command))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def minutes_left(job: PbsJob, now: float, margin: float) -> str:
    """Return after how many minutes the ranks must stop; empty without a time limit.

    Args:
        job: the running job.
        now: seconds since the epoch.
        margin: minutes that the last iterations and the save may take.

    Raises:
        UserError: nothing is left.
    """
    if job.seconds is None:
        return ""
    used = max(0.0, now - job.started)
    left = (job.seconds - used) / 60 - margin
    if left <= 0:
        raise UserError(
            f"walltime {job.seconds / 60:g} minutes: {used / 60:.1f} are used, and {margin:g} are "
            "kept for the last save (SAVE_MINUTES); submit with a larger -l walltime"
        )
    return f"{left:.2f}"


def submit(command: Sequence[str]) -> int:
    """Run qsub and report the new job, or what to type by hand."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = f"qsub: {error.strerror}"
    if problem:
        print(f"error: {problem}; submit the next job with:\n  {shlex.join(command)}")
        return 1
    print(f"submitted {done.stdout.strip()}: {shlex.join(command)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
