"""Checks of a run's save and load folders, before anything is written. Without torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.recognize import (
    Found,
    checkpoints,
    conversion,
    foreign,
    recognize,
    trackers,
)
from megatron_llmjp.errors import UserError
from megatron_llmjp.system import retried

METRICS = "metrics.jsonl"
_SHOWN = 4
"""Names of other files that a note shows."""
_OF_A_RUN = frozenset(
    {
        METRICS,
        manifests.TRACKER,
        "hang",
        "logs",
        "report",
        "requeues.jsonl",
        "stop",
        "tensorboard",
        "wandb",
        "wandb_run_id.txt",
    }
)
"""What this program, its launchers and wandb write to a save folder, hidden files apart."""


def check_save_folder(root: Path) -> list[str]:
    """Refuse a ``--save`` folder whose checkpoints the run would ignore and overwrite.

    Returns:
        Notes for the user.

    Raises:
        UserError: it holds checkpoints of another program, or some of this one that have lost
            their manifests; it is a checkpoint itself; or it cannot be read.
    """
    try:
        return retried(lambda: _check_save(root), str(root))
    except (FileNotFoundError, NotADirectoryError):
        return []  # whether it can be made is checked with the other folders of a run
    except OSError as error:
        raise UserError(f"--save {root}: cannot be read: {error.strerror}") from None


def not_ours(root: Path) -> str | None:
    """Why ``--load ROOT`` holds nothing to resume from, where its files show it."""
    try:
        found = foreign(root)
        lost = [] if found else checkpoints(root)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"--load {root}: cannot be read: {error.strerror}"
    if found is not None:
        return (
            f"--load {root}: {found.folder} is {found.title}: convert it first\n"
            f"  {conversion(found, root)}"
        )
    if lost:
        return f"--load {root}: {lost[-1].folder} is {lost[-1].title}, so it may be incomplete"
    return None


def _check_save(root: Path) -> list[str]:
    itself = recognize(root)
    if itself is not None:
        raise UserError(_refusal(root, itself))
    own = manifests.complete_iterations(root)
    found = foreign(root)
    if found is not None:
        raise UserError(_refusal(root, found))
    if own:
        return []
    lost = checkpoints(root)
    if lost:
        raise UserError(_refusal(root, lost[-1]))
    for file, name in trackers(root):
        raise UserError(
            f"--save {root}: {file.name} names checkpoint {name}, but no checkpoint is there: the "
            "run would start from iteration 1. Move the checkpoints back, or remove that file to "
            "start a new run"
        )
    return _check_others(root)


def _refusal(root: Path, found: Found) -> str:
    what = f"--save {root}: " + ("" if found.folder == root else f"{found.folder} ")
    what += f"is {found.title}"
    if found.is_foreign:
        return (
            f"{what}, which this run would ignore, and overwrite in time. Save to another folder, "
            f"or convert it:\n  {conversion(found, root)}"
        )
    if (found.folder / manifests.MANIFEST).is_file():
        return f"{what}; give the folder that holds it: --save {root.parent}"
    return (
        f"{what}: it was copied only in part, or its manifest was removed. This run would ignore "
        "it, start from iteration 1 and overwrite it in time. Copy it again, or save to another "
        "folder"
    )


def _check_others(root: Path) -> list[str]:
    """A folder without checkpoints: its metrics must be a run's, and other files are noted."""
    if _is_foreign_log(root / METRICS):
        raise UserError(
            f"--save {root}: its {METRICS} was written by another program, and this run would "
            "append to it. Save to another folder"
        )
    others = sorted(p.name for p in root.iterdir() if p.name not in _OF_A_RUN)
    others = [name for name in others if not name.startswith(".")]
    if not others:
        return []
    shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
    return [f"--save {root} holds other files ({shown}); the run writes its own next to them"]


def _is_foreign_log(path: Path) -> bool:
    """Whether the beginning of a file of JSON lines holds one that is no record of a run."""
    try:
        with path.open("rb") as stream:
            text = stream.read(1 << 16)
    except (FileNotFoundError, IsADirectoryError):
        return False
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a killed run leaves half a line
            record = json.loads(line)
            if not isinstance(record, dict) or not record.keys() >= {"iteration"}:
                return True
    return False
