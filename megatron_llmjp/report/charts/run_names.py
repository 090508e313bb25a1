"""Names of runs in reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_llmjp.report.history import MetricsHistory

GENERIC_NAMES = ("checkpoints", "checkpoint", "ckpt", "ckpts", "model", "output", "save")
"""Names of save folders that do not identify a run: the name of the parent folder is added."""


def run_name(run: MetricsHistory) -> str:
    """Return the name of a run: that in Weights & Biases, or of its save folder."""
    configured = run.config.logging.wandb_exp_name if run.config is not None else None
    return configured or _folder_name(run.folder, 1)


def run_names(runs: Sequence[MetricsHistory]) -> list[str]:
    """Return different names of several runs; equal ones get the names of the folders above."""
    names = [run_name(run) for run in runs]
    depth = 1
    while len(set(names)) < len(names) and depth < 8:
        depth += 1
        counts = Counter(names)
        names = [
            _folder_name(run.folder, depth) if counts[name] > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    return names


def _folder_name(folder: Path, depth: int) -> str:
    """Return the last ``depth`` parts of a folder's path, or one more for a generic name."""
    parts = folder.resolve().parts
    if parts[-1].lower() in GENERIC_NAMES:
        depth = max(depth, 2)
    return "/".join(part for part in parts[-depth:] if part != "/") or str(folder)
