"""Versions of installed packages and of the NVIDIA driver, found without importing anything."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

MISSING = "not installed"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def package_version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver_version(file: Path = _DRIVER_FILE) -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    try:
        found = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def apex_version() -> str | None:
    """Return the version of NVIDIA's Apex; the package index has another program of this name."""
    return package_version("apex") if find_spec("amp_C") is not None else None
