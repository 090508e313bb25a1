"""Reads a checkpoint back from disk as a resume would, every byte of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import safety
from megatron_llmjp.config.load import load_resolved
from megatron_llmjp.errors import UserError

PLAIN = "metadata.json"
"""megatron-core's note on the format."""


def problems(folder: Path, is_cancelled: Callable[[], bool] = lambda: False) -> list[str]:
    """What would keep a run from resuming here; empty when nothing would.

    The manifest, the configuration and the index are parsed, sizes and checksums of all files
    compared with the manifest. Only this process reads.

    Args:
        folder: a checkpoint.
        is_cancelled: asked between files; then the answer is that the check was not finished.
    """
    try:
        manifest = manifests.read(folder)
        load_resolved(folder / manifests.CONFIG)
        safety.read_index(folder)
        json.loads((folder / PLAIN).read_bytes())
        for name, entry in manifest.files.items():
            if is_cancelled():
                return [f"{folder}: the check was not finished"]
            found = manifests.problems(
                folder, manifest.model_copy(update={"files": {name: entry}}), checksums=True
            )
            if found:
                return found
    except (UserError, OSError, ValueError) as error:
        return [str(error)]
    return []
