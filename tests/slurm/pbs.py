"""A PBS of one machine: qsub and qstat as programs, and jobs started the way PBS does.

As observed with OpenPBS 23.06: a job starts in the home folder, without the PATH of a login; a
script is copied to a spool folder and gets no arguments; a program after ``--`` gets its arguments
unchanged; ``-v`` splits at commas; qstat wraps lines and joins the words of the submission.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support.processes import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT

MINIMAL_PATH = "/usr/local/bin:/usr/bin:/bin"


class Pbs:
    """Queue of jobs in a folder."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        self.folder, self.ranks = folder, ranks
        self.home, self.bin = folder / "home", folder / "bin"
        for name in (self.home, self.bin, folder / "jobs", folder / "spool"):
            name.mkdir(parents=True)
        for program in ("qsub", "qstat"):
            path = self.bin / program
            command = f"PYTHONPATH={ROOT} exec {sys.executable} -m tests.slurm.pbs {program}"
            path.write_text(f'#!/bin/sh\n{command} "{folder}" "$@"\n')
            path.chmod(0o755)

    def qsub(self, *words: str | Path, cwd: Path, **variables: str) -> str:
        """Submit a job as a user does, and return its number."""
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            [self.bin / "qsub", *words],
            cwd=cwd,
            env={**os.environ, "PATH": path, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.partition(".")[0]

    def waiting(self) -> list[str]:
        """Return the numbers of jobs that have not run."""
        return sorted(p.stem for p in self.folder.glob("jobs/*.json") if not _text(p).exists())

    def run(self, number: str, path: str = "") -> subprocess.CompletedProcess[str]:
        """Run a job and return its exit code and output; programs in ``path`` precede others."""
        job = json.loads((self.folder / "jobs" / f"{number}.json").read_text())
        nodes = self.folder / "nodes"
        nodes.write_text(f"{socket.gethostname()}\n" * self.ranks)
        env = {
            **job["variables"],
            "HOME": str(self.home),
            "PATH": f"{path}:{MINIMAL_PATH}" if path else MINIMAL_PATH,
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBID": f"{number}.stub",
            "PBS_NODEFILE": str(nodes),
            "PBS_O_PATH": job["path"],
            "PBS_O_WORKDIR": job["cwd"],
        }
        command = job["command"]
        if not job["is_program"]:
            script = self.folder / "spool" / f"{number}.SC"
            shutil.copy(Path(job["cwd"]) / command[0], script)
            command = ["bash", str(script)]
        _text(self.folder / "jobs" / f"{number}.json").write_text(_attributes(job, env))
        return subprocess.run(
            command, cwd=self.home, env=env, capture_output=True, text=True, timeout=PROCESS_TIMEOUT
        )


def _text(record: Path) -> Path:
    return record.with_suffix(".txt")


def _attributes(job: dict[str, object], env: dict[str, str]) -> str:
    escaped = {name: value.replace(",", "\\,") for name, value in env.items()}
    lines = {
        "Resource_List.walltime": "00:59:00",
        "stime": time.ctime(),
        "Variable_List": ",".join(f"{name}={escaped[name]}" for name in job["variables"]),  # type: ignore[attr-defined]
        "run_count": "1",
        "Submit_arguments": " ".join(job["words"]),  # type: ignore[arg-type]
    }
    text = f"Job Id: {env['PBS_JOBID']}\n"
    for name, value in lines.items():
        wrapped = f"{name} = {value}"
        pieces = [wrapped[i : i + 70] for i in range(0, len(wrapped), 70)]
        text += "    " + "\n\t".join(pieces) + "\n"
    return text


def qsub(folder: Path, words: list[str]) -> int:
    """Store a job: options with values, then ``--`` and a program, or a script."""
    variables: dict[str, str] = {}
    at = 0
    while words[at].startswith("-") and words[at] != "--":
        if words[at] == "-v":
            for pair in words[at + 1].split(","):
                name, equals, value = pair.partition("=")
                if not equals and name not in os.environ:
                    print("qsub: cannot send environment with the job", file=sys.stderr)
                    return 1
                variables[name] = value if equals else os.environ[name]
        at += 2
    is_program = words[at] == "--"
    job = {
        "words": words,
        "command": words[at + is_program :],
        "is_program": is_program,
        "variables": variables,
        "cwd": str(Path.cwd()),
        "path": os.environ["PATH"],
    }
    number = len(list(folder.glob("jobs/*.json"))) + 1
    (folder / "jobs" / f"{number}.json").write_text(json.dumps(job))
    print(f"{number}.stub")
    return 0


def qstat(folder: Path, words: list[str]) -> int:
    """Print a job that is running."""
    print((folder / "jobs" / f"{words[-1].partition('.')[0]}.txt").read_text())
    return 0


if __name__ == "__main__":
    program = {"qsub": qsub, "qstat": qstat}[sys.argv[1]]
    sys.exit(program(Path(sys.argv[2]), sys.argv[3:]))
