"""GPUs that this process sees, and the evidence that it should see some.

A process without a usable GPU would train on the CPU. That is wanted on a machine without GPUs,
and a mistake wherever a GPU is expected: with a CUDA build of torch, with NVIDIA device files, or
if the launcher granted GPUs. An empty ``CUDA_VISIBLE_DEVICES`` hides GPUs on purpose.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_llmjp.config.model_config import DeviceChoice

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_HIDDEN = ("", "-1")
"""Values of ``CUDA_VISIBLE_DEVICES`` that hide all GPUs."""

_GRANTED = (
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_TASK",
    "PBS_NGPUS",
)
"""Variables by which a job scheduler states the GPUs that it granted."""

INSTALLATION = "docs/installation.md"


@dataclass(frozen=True)
class VisibleGpus:
    """What a process sees of its machine's GPUs."""

    count: int
    """Number of GPUs that torch can use."""
    torch_version: str
    built_for: str | None
    """CUDA version that torch was built for; None for a CPU build."""
    failure: str
    """Error of the driver, as torch reports it."""
    device_files: tuple[str, ...]
    """NVIDIA device files of the machine."""
    granted: tuple[str, ...]
    """Variables of the job scheduler that grant GPUs, as ``NAME=value``."""
    visible: str | None
    """``CUDA_VISIBLE_DEVICES``; None if it is not set."""

    def problem(self, choice: DeviceChoice) -> str:
        """Return why a process that should use a GPU cannot; empty if it can, or need not."""
        if self.count or choice == "cpu":
            return ""
        reasons = ["--device cuda is set"] if choice == "cuda" else self.reasons_to_expect()
        if not reasons:
            return ""
        return f"{self.explain_missing()}. A GPU is expected because {' and '.join(reasons)}"

    def reasons_to_expect(self) -> list[str]:
        """Return why this process should see a GPU; empty if it need not."""
        reasons = [f"{variable} is set" for variable in self.granted]
        if self.visible in _HIDDEN:
            return reasons
        if self.visible is not None:
            reasons.append(f"{VISIBLE_DEVICES}={self.visible} is set")
        if self.built_for is not None:
            reasons.append(f"torch {self.torch_version} is a CUDA build")
        if self.device_files:
            reasons.append(f"{self.device_files[0]} exists")
        return reasons

    def explain_missing(self) -> str:
        """Return why torch sees no GPU, and how to fix it."""
        if self.built_for is None:
            return (
                f"torch {self.torch_version} is a CPU build: install the CUDA build for your "
                f"driver ({INSTALLATION})"
            )
        if self.failure:
            return f"{self.failure} (torch is built for CUDA {self.built_for}; see {INSTALLATION})"
        if self.visible in _HIDDEN:
            return f"{VISIBLE_DEVICES} is empty, which hides all GPUs: unset it"
        if not self.device_files:
            return (
                "there is no /dev/nvidia0: this machine has no GPU, or its driver is not loaded "
                "(check nvidia-smi; a container needs --nv or --gpus all)"
            )
        if self.visible is not None:
            return f"{VISIBLE_DEVICES}={self.visible} names no GPU of this machine"
        return "the driver reports no GPU: check nvidia-smi"


def find_gpus(env: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> VisibleGpus:
    """Find the GPUs that torch can use, and the evidence for others. Initializes the driver."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    messages = [str(warning.message) for warning in caught]
    return VisibleGpus(
        count=count,
        torch_version=torch.__version__,
        built_for=torch.version.cuda,
        failure=next((_shorten(m) for m in messages if "CUDA" in m), ""),
        device_files=tuple(sorted(str(path) for path in devices.glob("nvidia[0-9]*"))),
        granted=tuple(f"{n}={env[n]}" for n in _GRANTED if env.get(n, "0") not in ("", "0")),
        visible=env.get(VISIBLE_DEVICES),
    )


def _shorten(message: str) -> str:
    """Return the first sentence of torch's warning, which names the cause."""
    text = message.removeprefix("CUDA initialization: ").partition(" (Triggered internally")[0]
    return re.split(r"\. (?=[A-Z])", text.strip())[0].rstrip(".")
