"""A real Slurm on one machine: munged, slurmctld and several slurmd, with all files in one folder.

The nodes are named n0, n1, ... and share this host, each slurmd on its own port. The machine's own
Slurm configuration is neither read nor changed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from megatron_llmjp.parallel.launcher import free_port
from tests.support.timeouts import PROCESS_TIMEOUT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo")
INSTALL = "install Debian's slurm-wlm and munge"
_SBIN = "/usr/sbin:/sbin"
_UNKNOWN_JOB = "GONE"


def missing_programs() -> list[str]:
    """Return the required programs that are not installed."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """A running Slurm; use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        cpus: int = 8,
        gpus: int = 2,
        task_plugin: str = "task/none",
    ) -> None:
        """Describe a cluster.

        Args:
            folder: for all of its files.
            nodes: number of nodes.
            cpus: CPUs of each node; with ``task/affinity`` at most those of this machine, since a
                task that cannot be bound to its CPUs does not start.
            gpus: GPUs of each node, which are files.
            task_plugin: Slurm's TaskPlugin.
        """
        self.folder = folder
        self._task_plugin = task_plugin
        self.nodes = [f"n{i}" for i in range(nodes)]
        self._cpus, self._gpus = cpus, gpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        path = f"{os.environ['PATH']}:{_SBIN}"
        self.env = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        self._write_configuration()
        try:
            self._start("munged", *self._munge_flags())
            self._wait(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self._wait(self._all_idle, "nodes to become idle")
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user", getpass.getuser(), check=False)
        self._stop_all()

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, also after :meth:`kill_node`."""
        self._start(f"slurmd-{node}", "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """Kill a node as in a power failure: its slurmd, job steps and tasks."""
        self._daemons[f"slurmd-{node}"].kill()
        self._daemons[f"slurmd-{node}"].wait()
        tasks = _processes_with(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.env['SLURM_CONF']}")
        # First the managers of job steps, which would report the end of their tasks.
        for pid in {manager for task in tasks for manager in _step_managers(task)}:
            _kill(pid)
        for pid in tasks:
            _kill(pid)

    def tasks(self, job: str) -> list[int]:
        """Return the process ids of a job's ranks."""
        ranks = []
        for pid in _processes_with(f"SLURM_CONF={self.env['SLURM_CONF']}", f"SLURM_JOB_ID={job}"):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                ranks += [pid] if any(w.endswith(b"pretrain_gpt.py") for w in words[:2]) else []
        return ranks

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a Slurm command and return its output."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PROCESS_TIMEOUT,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Run sbatch and return the job id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=PROCESS_TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def state(self, job: str) -> str:
        """Return the state of a job, or of all tasks of an array: COMPLETED if all are."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        states = {_field(line, "JobState") for line in shown.splitlines() if "JobState" in line}
        if not states:
            return _UNKNOWN_JOB
        return states.pop() if len(states) == 1 else ",".join(sorted(states))

    def wait(self, job: str, *states: str) -> str:
        """Wait until a job is in one of some states, by default until it has ended."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._wait(lambda: self.state(job) in wanted, f"job {job} to be {wanted}")
        return self.state(job)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; on timeout, fail with the daemons' logs."""
        self._wait(condition, what)

    def _write_configuration(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", "spool", "devices"):
            (self.folder / name).mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(self._slurm_conf(host))
        lines = []
        for node in self.nodes:
            for i in range(self._gpus):  # any file can serve as a device
                device = self.folder / "devices" / f"{node}-{i}"
                device.touch()
                lines.append(f"NodeName={node} Name=gpu File={device}")
        (self.folder / "gres.conf").write_text("\n".join(lines) + "\n")

    def _slurm_conf(self, host: str) -> str:
        f = self.folder
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs={self._cpus} RealMemory=8000 Gres=gpu:{self._gpus}"
            for node in self.nodes
        )
        return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={f}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={f}/state
SlurmdSpoolDir={f}/spool/%n
SlurmctldPidFile={f}/slurmctld.pid
SlurmdPidFile={f}/slurmd-%n.pid
SlurmctldLogFile={f}/slurmctld.log
SlurmdLogFile={f}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={self._task_plugin}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
KillWait=20
MinJobAge=3600
MessageTimeout=30
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
"""

    def _munge_flags(self) -> Sequence[str]:
        f = self.folder
        return (
            "--foreground",
            "--force",
            f"--key-file={f}/munge.key",
            f"--socket={f}/munge.socket",
            f"--pid-file={f}/munged.pid",
            f"--log-file={f}/munged.log",
            f"--seed-file={f}/munged.seed",
        )

    def _start(self, name: str, *flags: str, program: str | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program or name, *flags], env=self.env, stdout=output, stderr=output
            )

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "-N", "-o", "%T", check=False).split()
        return len(states) == len(self.nodes) and set(states) == {"idle"}

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PROCESS_TIMEOUT
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"waited {PROCESS_TIMEOUT:.0f} s for {what}\n{self._logs()}")
            time.sleep(0.25)

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in logs)

    def _stop_all(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for pid in _processes_with(f"SLURM_CONF={self.env['SLURM_CONF']}"):
            _kill(pid)


def _field(line: str, name: str) -> str:
    return line.split(f"{name}=", 1)[1].split(maxsplit=1)[0]


def _processes_with(*settings: str) -> list[int]:
    """Return the processes whose environment has all settings."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if set(settings) <= set(environment):
            found.append(int(entry.name))
    return found


def _step_managers(task: int) -> list[int]:
    """Return the slurmstepd among the parents of a process."""
    with contextlib.suppress(psutil.Error):
        parents = psutil.Process(task).parents()
        return [parent.pid for parent in parents if parent.name() == "slurmstepd"]
    return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
