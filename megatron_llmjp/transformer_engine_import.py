"""Import of Transformer Engine before megatron-core, to report an incomplete installation.

megatron-core imports Transformer Engine in many modules, wherever it finds it. If a part of it is
missing or was compiled for another torch, these imports end in different exceptions, or in layers
that do not exist. So the first import of megatron-core imports Transformer Engine first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

from megatron_llmjp.errors import UserError

_PACKAGES = (
    "transformer-engine",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
    "transformer-engine-torch",
)


class _ImportCheck(MetaPathFinder):
    """Finder that finds nothing, and is asked when ``megatron.core`` is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Check Transformer Engine before the import of ``megatron.core`` continues."""
        if fullname == "megatron.core":
            check_transformer_engine()


def check_before_megatron_core() -> None:
    """Let every import of megatron-core check Transformer Engine first."""
    if not any(isinstance(finder, _ImportCheck) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportCheck())


def is_installed() -> bool:
    """Return whether Transformer Engine is installed, without importing it."""
    return find_spec("transformer_engine") is not None


def check_transformer_engine() -> None:
    """Import Transformer Engine if it is installed.

    Raises:
        UserError: it cannot be imported.
    """
    if not is_installed():
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module("transformer_engine.pytorch")
    except Exception as error:  # RuntimeError, OSError or ImportError, by what is missing
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise UserError(
            f"Transformer Engine is installed ({_installed()}) but cannot be imported: "
            f"{type(error).__name__}: {reason}. Either install all of it, after torch and for the "
            "same torch: `pip install --no-build-isolation 'transformer-engine[pytorch]'` on a "
            "machine with CUDA (docs/installation.md); or run without it: "
            f"`pip uninstall {' '.join(_PACKAGES)}`"
        ) from error


def _installed() -> str:
    """Return the installed packages of Transformer Engine, and those that are not."""
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    missing = [name for name in missing if "-cu" not in name]
    if not any(name.startswith("transformer-engine-cu") for name in found):
        missing.append("transformer-engine-cu12 or -cu13")
    parts = [", ".join(found) or "without package metadata"]
    return "; ".join([*parts, *([f"missing: {', '.join(missing)}"] if found and missing else [])])
