"""The nodes of this Slurm job: which are lost, drained, or excluded from it."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slurm.sick_nodes import DRAINED, LOST, SILENT, SickNode

PROBE_SECONDS = 120
"""Longest wait for a task on every node: srun waits for nodes that do not respond."""
COMMAND_SECONDS = 60
"""Longest wait for Slurm's controller."""
STOP_SECONDS = 10
"""Longest wait for a command to end that is stopped: srun may wait for a dead node."""
PARALLEL_PROBES = 8
"""Nodes that are probed at the same time, each on its own."""
PROBES = 3
"""Probes of a node on its own: a busy node or network may refuse one."""
PROBE_PAUSE = 5.0
"""Seconds between them."""
UNUSABLE = ("down", "drain", "fail")
"""Starts of the states in which Slurm gives a node to no job."""


class SlurmJob:
    """Queries about this job, and changes of its nodes.

    Args:
        job: job id.
        folder: folder of the logs of this start.
    """

    def __init__(self, job: str, folder: Path) -> None:
        self._job, self._folder = job, folder

    def lost_nodes(self, nodes: Sequence[str]) -> list[SickNode]:
        """Return nodes that Slurm removed from the job, that do not respond, or that it drains.

        Args:
            nodes: the nodes that the job had at its start.
        """
        current = self._nodes("NodeList")
        if not current:
            return []  # Slurm does not respond
        states = self._states(nodes)
        silent = self._silent(current)
        found = []
        for node in nodes:
            state, reason = states.get(node, ("", ""))
            because = f" ({state}: {reason})" if reason and reason != "none" else ""
            if node not in current:
                found.append(SickNode(node, LOST, f"Slurm removed it from the job{because}"))
            elif node in silent:
                found.append(SickNode(node, SILENT, f"does not respond to srun{because}"))
            elif state.startswith(UNUSABLE):
                found.append(SickNode(node, DRAINED, f"its state is {state}{because}"))
        return found

    def keep_only(self, nodes: Sequence[str]) -> None:
        """Give up the other nodes: without this, Slurm may end the job when it finds them down."""
        if set(self._nodes("NodeList")) <= set(nodes):
            return
        # scontrol writes scripts to the working folder that would set the job's variables again.
        change = ["scontrol", "update", f"JobId={self._job}", f"NodeList={','.join(nodes)}"]
        _run(change, COMMAND_SECONDS, self._folder)
        for script in self._folder.glob(f"slurm_job_{self._job}_resize.*"):
            script.unlink(missing_ok=True)

    def excluded(self) -> list[str]:
        """Return the nodes that Slurm excludes from the job."""
        return self._nodes("ExcNodeList")

    def usable_nodes(self) -> set[str]:
        """Return the nodes of the job's partition that Slurm gives to jobs; empty if unknown."""
        partition = self._field("Partition")
        if not partition:
            return set()
        listed = _run(["sinfo", "-h", "-N", "-p", partition, "-o", "%N|%T"], COMMAND_SECONDS)
        rows = (line.partition("|") for line in listed.splitlines())
        return {name for name, _, state in rows if not state.startswith(UNUSABLE)}

    def _field(self, name: str) -> str:
        shown = _run(["scontrol", "--oneliner", "show", "job", self._job], COMMAND_SECONDS)
        found = re.search(rf"(?:^| ){name}=(\S+)", shown)
        return found[1] if found and found[1] != "(null)" else ""

    def _nodes(self, field: str) -> list[str]:
        listed = self._field(field)
        if not listed:
            return []
        return _run(["scontrol", "show", "hostnames", listed], COMMAND_SECONDS).split()

    def _states(self, nodes: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        """Return state and reason of each node."""
        listed = _run(
            ["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N|%T|%E"], COMMAND_SECONDS
        )
        rows = [line.split("|", 2) for line in listed.splitlines() if line.count("|") > 1]
        return {name: (state, reason) for name, state, reason in rows}

    def _silent(self, nodes: Sequence[str]) -> set[str]:
        """Return the nodes on which no task starts; none if that is so on all of them.

        If a node does not respond, srun gives up the whole step, whose other tasks may not have
        started yet: nodes without an answer are probed again, each on its own.
        """
        answered = self._answering(nodes)
        rest = [node for node in nodes if node not in answered]
        with ThreadPoolExecutor(PARALLEL_PROBES) as pool:
            answered.update(itertools.compress(rest, pool.map(self._answers, rest)))
        return set(nodes) - answered if answered else set()

    def _answers(self, node: str) -> bool:
        """Return whether a task starts on a node."""
        for probe in range(PROBES):
            if probe:
                time.sleep(PROBE_PAUSE)
            if self._answering([node]):
                return True
        return False

    def _answering(self, nodes: Sequence[str]) -> set[str]:
        """Return the nodes on which a task starts."""
        step = ["srun", "--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}"]
        step += ["--ntasks-per-node=1", f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=0"]
        shell = ["bash", "-c", "echo responds: $SLURMD_NODENAME"]
        return set(re.findall(r"^responds: (\S+)$", _run([*step, *shell], PROBE_SECONDS), re.M))


def _run(command: Sequence[str], seconds: float, folder: Path | None = None) -> str:
    """Return what a command prints, also if it fails or is stopped after some seconds."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
        try:
            return process.communicate(timeout=STOP_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0]
    return ""
