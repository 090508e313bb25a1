"""Checks of one node by itself: GPUs, GEMM, NVLink, InfiniBand, kernel log, save folder."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import disk_usage, which

from megatron_llmjp.config.model_config import DeviceChoice
from megatron_llmjp.preflight import infiniband, kernel_log, measurements, nvidia_smi
from megatron_llmjp.preflight.facts import NodeFacts
from megatron_llmjp.preflight.settings import Settings, Thresholds
from megatron_llmjp.preflight.workers import WorkerError, call_all, run_command, shorten

_CLOCK_SECONDS = 0.5
"""Pause between two queries of the clocks."""


@dataclass(frozen=True)
class Expectations:
    """What the run needs of every node."""

    save: Path | None
    """Folder of the checkpoints; None to skip its check."""
    free_disk_gb: float
    gpus: int
    """GPUs per node that the scheduler granted."""
    device: DeviceChoice


class LocalChecks:
    """Checks of this node; :meth:`run` first, :meth:`finish` after the tests between nodes."""

    def __init__(self, facts: NodeFacts, expected: Expectations, settings: Settings) -> None:
        self._facts, self._expected, self._settings = facts, expected, settings
        self._ports: dict[str, infiniband.Port] = {}
        self._nvlinks: dict[int, nvidia_smi.NvLinks] = {}
        self._slowdowns: dict[str, str] = {}

    def run(self) -> None:
        """Run all checks and measurements that need this node only."""
        self._facts.versions |= {name: version(name) for name in ("torch", "megatron-core")}
        self._facts.versions |= {"numpy": version("numpy"), "python": sys.version.split()[0]}
        self._find_device()
        self._check_save_folder()
        self._check_gpus()
        self._ports = infiniband.read_ports()
        self._nvlinks = self._read_nvlinks()
        self._facts.infiniband = {name: port.as_dict() for name, port in self._ports.items()}
        self._facts.nvlinks = {str(gpu): asdict(one) for gpu, one in self._nvlinks.items()}
        self._measure_gemm()
        self._measure_all_reduce()

    def finish(self, thresholds: Thresholds) -> None:
        """Report the error counters that increased, and messages of the kernel."""
        facts = self._facts
        facts.add("infiniband", *infiniband.counter_problems(self._ports, infiniband.read_ports()))
        facts.add("nvlink", *nvidia_smi.nvlink_problems(self._nvlinks, self._read_nvlinks()))
        if facts.gpus:
            try:
                log = run_command(["dmesg"], self._settings.command_seconds)
                uptime = float(Path("/proc/uptime").read_text().split()[0])
            except (RuntimeError, OSError):
                return  # often readable by root only
            xids = kernel_log.parse_xids(log)
            facts.add("xid", *kernel_log.xid_problems(xids, uptime, thresholds.xid_hours))

    def _find_device(self) -> None:
        facts = self._facts
        try:
            ((facts.device, count, problem),) = call_all(
                measurements.probe_device,
                [(self._expected.device,)],
                self._settings.command_seconds,
            )
        except WorkerError as error:
            facts.add("device", f"torch cannot look for GPUs: {error}")
            return
        facts.devices = count or 1
        facts.add("device", *[problem] * bool(problem))

    def _check_save_folder(self) -> None:
        save, facts = self._expected.save, self._facts
        if save is None:
            return
        try:
            ((speed, free),) = call_all(
                _measure_save_folder,
                [(save, facts.node, self._settings.disk_mib)],
                self._settings.local_seconds / 2,
            )
        except WorkerError as error:
            facts.add("save folder", f"{save} cannot be written: {error}")
            return
        if self._settings.disk_mib >= self._settings.min_disk_mib:
            facts.disk_gbs = speed
        if free < self._expected.free_disk_gb * 1e9:
            facts.add(
                "free space",
                f"{save} has {free / 1e9:.0f} GB free; {self._expected.free_disk_gb:g} GB are "
                "required (PREFLIGHT_FREE_GB)",
            )

    def _check_gpus(self) -> None:
        """Check the GPUs of the scheduler, also if the run uses the CPU."""
        if self._expected.gpus == 0 and self._facts.device != "cuda":
            return
        rows = self._query("--query-gpu", nvidia_smi.GPU_FIELDS)
        if rows is None:
            return
        self._facts.gpus = rows
        self._facts.add("gpus", *nvidia_smi.gpu_problems(rows, self._expected.gpus))
        models = sorted({f"{row.get('name')} {row.get('memory.total')} MiB" for row in rows})
        self._facts.versions["GPUs"] = ", ".join(models)
        self._facts.driver = str(rows[0].get("driver_version") or "") if rows else "none"
        remapped = self._query("--query-remapped-rows", nvidia_smi.REMAPPED_FIELDS) or []
        self._facts.add("remapped rows", *nvidia_smi.remapping_problems(remapped))

    def _query(self, option: str, fields: Sequence[str]) -> list[nvidia_smi.Row] | None:
        if which("nvidia-smi") is None:
            return None
        try:
            return nvidia_smi.query(self._command, option, fields)
        except RuntimeError as error:
            if option == "--query-gpu" and not self._facts.gpus:
                self._facts.add("nvidia-smi", shorten(str(error)))
            return None

    def _command(self, command: Sequence[str]) -> str:
        return run_command(command, self._settings.command_seconds)

    def _read_nvlinks(self) -> dict[int, nvidia_smi.NvLinks]:
        if not self._facts.gpus:
            return {}
        try:
            status = self._command(["nvidia-smi", "nvlink", "--status"])
            return nvidia_smi.parse_nvlinks(
                status, self._command(["nvidia-smi", "nvlink", "--errorcounters"])
            )
        except RuntimeError:
            return {}  # GPUs without NVLink

    def _measure_gemm(self) -> None:
        """Measure all devices at the same time, as in training, and their clocks meanwhile."""
        facts, seconds = self._facts, self._settings.gemm_seconds
        if not facts.can_communicate():
            return
        try:
            facts.gemm_tflops = call_all(
                measurements.measure_gemm,
                [(facts.device, index, seconds) for index in range(facts.devices)],
                seconds + self._settings.command_seconds,
                self._observe_clocks if facts.device == "cuda" else lambda: "",
            )
        except WorkerError as error:
            facts.add("gemm", f"matrix multiplications failed: {error}")
        facts.add("slowdown", *sorted(self._slowdowns.values()))

    def _observe_clocks(self) -> str:
        """Record the GPUs whose clocks are reduced now; never a reason to stop."""
        rows = self._query("--query-gpu", nvidia_smi.GPU_FIELDS) if self._facts.gpus else None
        for problem in nvidia_smi.slowdown_problems(rows or []):
            self._slowdowns.setdefault(problem.partition(":")[0], problem)
        time.sleep(_CLOCK_SECONDS)
        return ""

    def _measure_all_reduce(self) -> None:
        """Measure the bandwidth between the GPUs of this node."""
        facts, mib = self._facts, self._settings.gpu_message_mib
        if facts.devices == 1 or not facts.can_communicate():
            return
        test = measurements.GroupTest(
            facts.device, facts.devices, 1, None, "node", mib, self._settings.link_seconds
        )
        with tempfile.TemporaryDirectory() as folder:
            calls = [(test, 0, local, folder, dict(os.environ)) for local in range(facts.devices)]
            try:
                results = call_all(measurements.measure_group, calls, self._settings.link_seconds)
            except WorkerError as error:
                facts.add("node all-reduce", f"communication between its GPUs failed: {error}")
                return
        slowest = max(seconds for _, seconds in results)
        facts.all_reduce_gbs = measurements.bus_bandwidth(mib, slowest, facts.devices)


def _measure_save_folder(folder: Path, node: str, mib: int) -> tuple[float, int]:
    """Return the write speed in GB/s, and the free bytes.

    The best of several files counts: one may be on a slow server of the file system, which says
    nothing about the node.
    """
    speeds = [measurements.measure_disk(folder, node, mib) for _ in range(measurements.REPEATS)]
    return max(speeds), disk_usage(folder).free
