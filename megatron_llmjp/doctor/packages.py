"""Diagnosis of Python and its packages: required ones, extras, torch, Transformer Engine, Apex."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from megatron_llmjp.doctor.findings import Finding
from megatron_llmjp.doctor.versions import MISSING, apex_version, package_version
from megatron_llmjp.versions import cuda_of_torch

DISTRIBUTION = "megatron_llmjp"
EXTRAS = {
    "remote": "input from s3:// and https:// (preprocess_data)",
    "fast-data": "faster BPE tokenization and gzip (preprocess_data)",
    "lz4": "input compressed with lz4",
    "wandb": "--wandb-project",
    "dev": "the tests and checks of this project (make test, make lint)",
}
"""Purpose of the extras; ``gpu`` is Transformer Engine, which has a finding of its own."""
INSTALLATION = "docs/installation.md"
IMPORT_SECONDS = 300
"""Time limit of the import of torch: from a cold network file system it takes minutes."""

_IMPORT_TORCH = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": names,
                  "nccl": nccl, "gloo": dist.is_gloo_available()}))
"""


@dataclass(frozen=True)
class TorchState:
    """The installed torch, as a process of its own has imported it."""

    gpus: tuple[str, ...] = ()
    nccl: str | None = None
    error: str | None = None
    """Why it cannot be imported."""


def import_torch() -> TorchState:
    """Import torch in another process, which a broken library may crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _IMPORT_TORCH],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return TorchState(error=f"its import takes more than {IMPORT_SECONDS} s")
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return TorchState(error=last)
    return TorchState(tuple(found["gpus"]), found["nccl"])


def package_findings(torch: TorchState | None) -> Iterator[Finding]:
    """Yield the findings on Python and its packages.

    Args:
        torch: the imported torch; None if it was not imported.
    """
    yield _python()
    yield _torch(torch)
    yield _required_packages()
    yield _transformer_engine()
    yield _apex()
    for extra, purpose in EXTRAS.items():
        yield _extra(extra, purpose)


def _python() -> Finding:
    version = platform.python_version()
    is_known = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        "Python",
        "ok" if is_known else "broken",
        f"{version}, {sys.executable}",
        "everything: 3.10 to 3.13",
        "make PYTHON=python3.12 install",
        required=True,
    )


def _torch(imported: TorchState | None) -> Finding:
    version, cuda = package_version("torch"), cuda_of_torch()
    build = f"for CUDA {cuda}" if cuda else "CPU build"
    error = imported.error if imported is not None and version else None
    return Finding(
        "torch",
        "missing" if version is None else "broken" if error else "ok",
        error or (f"{version}, {build}" if version else MISSING),
        "training, estimates with --suggest-layout and --verify of conversions",
        f"make install, or the build for your driver: {INSTALLATION}",
        required=True,
    )


def _required_packages() -> Finding:
    wanted = [one for one in _requirements() if one.marker is None and one.name != "torch"]
    problems = [problem for one in wanted if (problem := _problem(one)) is not None]
    core = package_version("megatron-core")
    return Finding(
        "packages",
        "ok" if not problems else "broken",
        ", ".join(problems) or f"{len(wanted)} found; megatron-core {core}",
        "everything",
        f"{sys.executable} -m pip install -e .",
        required=True,
    )


def _extra(extra: str, purpose: str) -> Finding:
    wanted = [
        one
        for one in _requirements()
        if one.marker is not None and one.marker.evaluate({"extra": extra})
    ]
    problems = [problem for one in wanted if (problem := _problem(one)) is not None]
    return Finding(
        f"extra {extra}",
        "missing" if problems else "ok",
        ", ".join(problems) or ", ".join(one.name for one in wanted),
        purpose,
        f"{sys.executable} -m pip install -e '.[{extra}]'",
    )


def _transformer_engine() -> Finding:
    version = package_version("transformer-engine")
    return Finding(
        "Transformer Engine",
        "missing" if version is None else "ok",
        version or MISSING,
        "fused layers and attention on GPUs, and context parallelism",
        f"make install-te (compiles; {INSTALLATION})",
    )


def _apex() -> Finding:
    version = apex_version()
    return Finding(
        "Apex",
        "missing" if version is None else "ok",
        version or MISSING,
        "gradient accumulation fusion of layers outside Transformer Engine; optional",
        f"compiled from NVIDIA's repository, not the package index: {INSTALLATION}",
    )


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:  # run from a copy of the source
        return []


def _problem(wanted: Requirement) -> str | None:
    """Return what is wrong with an installed package; None if nothing is."""
    version = package_version(wanted.name)
    if version is None:
        return f"{wanted.name} is {MISSING}"
    if not wanted.specifier.contains(version, prereleases=True):
        return f"{wanted.name} {version} instead of {wanted.specifier}"
    return None
