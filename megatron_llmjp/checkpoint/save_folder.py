"""Checks of the ``--save`` and ``--load`` folders before anything is written. Without torch.

Checkpoints of this program, Megatron-LM, Megatron-DeepSpeed and Hugging Face are recognized by the
names of their files; no file of a checkpoint is opened.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import retry_transient
from megatron_llmjp.metric_registry import EXPERT_TOKENS_FILE, METRICS_FILE

NATIVE = "native"
HUGGING_FACE = "hf"
MEGATRON_LM = "megatron-lm"
MEGATRON_DEEPSPEED = "megatron-deepspeed"
LATEST = "latest"
"""Megatron-DeepSpeed's tracker file."""

_CHECKPOINT = re.compile(r"iter_\d+|release|global_step\d+")
"""Names of the checkpoint folders of Megatron-LM, Megatron-DeepSpeed and this program."""
_NATIVE_FILES = (manifests.CONFIG, manifests.FOLDS)
"""Files that no other program writes; Megatron-LM from core 0.20 on has a ``tokenizer``, too."""

_MAX_LISTED = 4
"""Maximum number of other files listed in a note."""
_RUN_FILES = frozenset(
    {
        EXPERT_TOKENS_FILE,
        METRICS_FILE,
        manifests.TRACKER,
        "exclusions.jsonl",
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
"""Files that this program, the Slurm scripts and wandb write to a save folder; no hidden ones."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete or incomplete checkpoint."""

    folder: Path
    format: str | None
    """Name of the format in ``convert_checkpoint --from``; None if unknown."""
    title: str
    """Description for messages, with an article."""

    @property
    def is_foreign(self) -> bool:
        """Whether another program saved it."""
        return self.format not in (NATIVE, None)


def recognize(folder: Path) -> FoundCheckpoint | None:
    """Recognize a checkpoint folder by the files directly in it; None for any other folder.

    Raises:
        OSError: the folder cannot be read.
    """
    names = {path.name for path in folder.iterdir()}
    if manifests.MANIFEST in names:
        return FoundCheckpoint(folder, NATIVE, "a checkpoint of this program")
    if "config.json" in names and _any(names, r".*\.safetensors|pytorch_model.*|model\.safe.*"):
        return FoundCheckpoint(folder, HUGGING_FACE, "a Hugging Face model")
    if _any(names, r"mp_rank_\d+.*_model_states\.pt|layer_\d+-model_.*\.pt"):
        return FoundCheckpoint(folder, MEGATRON_DEEPSPEED, "a Megatron-DeepSpeed checkpoint")
    if _any(names, r"mp_rank_\d+.*"):
        title = "a Megatron-LM checkpoint (--ckpt-format torch, one folder per rank)"
        return FoundCheckpoint(folder, MEGATRON_LM, title)
    if any(name in names for name in _NATIVE_FILES) and ("config.json" not in names):
        return FoundCheckpoint(
            folder, NATIVE, f"a checkpoint of this program without {manifests.MANIFEST}"
        )
    if ".metadata" in names and {"common.pt", "metadata.json"} & names:
        return FoundCheckpoint(
            folder, MEGATRON_LM, "a Megatron-LM checkpoint (--ckpt-format torch_dist)"
        )
    if ".metadata" in names or _any(names, r".*\.distcp"):
        return FoundCheckpoint(folder, None, "a part of a torch_dist checkpoint")
    return None


def list_checkpoints(root: Path) -> list[FoundCheckpoint]:
    """List the checkpoints in a folder (``iter_*``, ``release``, ``global_step*``), oldest first.

    Folders with such a name and unknown files are included.

    Raises:
        OSError: the folder cannot be read.
    """
    names = [p.name for p in root.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    found = []
    for name in sorted(names, key=lambda name: int("0" + re.sub(r"\D", "", name))):
        what = recognize(root / name)
        found.append(
            what or FoundCheckpoint(root / name, None, "a checkpoint without any known files")
        )
    return found


def find_foreign_checkpoint(root: Path) -> FoundCheckpoint | None:
    """Find the newest checkpoint of another program: the folder itself, or one in it.

    Raises:
        OSError: the folder cannot be read.
    """
    itself = recognize(root)
    if itself is not None:
        return itself if itself.is_foreign else None
    return next((found for found in reversed(list_checkpoints(root)) if found.is_foreign), None)


def read_trackers(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the tracker files that name a checkpoint, and the name."""
    for file, pattern in ((manifests.TRACKER, r"\d+|release"), (LATEST, r"global_step\d+")):
        try:
            text = (root / file).read_bytes()[:100].decode(errors="replace").strip()
        except OSError:
            continue
        if re.fullmatch(pattern, text):
            yield root / file, text


def conversion_commands(found: FoundCheckpoint, root: Path) -> str:
    """Return the commands to convert another program's checkpoint and train from it."""
    output = f"{str(root).rstrip('/')}-native"
    if found.format == HUGGING_FACE:
        flags, start = "", f"--load {output} --finetune"
    else:
        flags, start = " --with-optimizer", f"--load {output}"
    return (
        f"convert_checkpoint --from {found.format} --to native{flags} --input {found.folder} "
        f"--output {output}\n"
        f"  then train with {start} and another --save folder"
    )


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def check_save_folder(root: Path) -> list[str]:
    """Refuse a ``--save`` folder whose checkpoints the run would ignore and overwrite.

    Returns:
        Notes for the user.

    Raises:
        UserError: it contains checkpoints of another program or checkpoints without manifests, is a
            checkpoint itself, or cannot be read.
    """
    try:
        return retry_transient(lambda: _check_contents(root), str(root))
    except (FileNotFoundError, NotADirectoryError):
        return []  # start_checks.py checks whether it can be created
    except OSError as error:
        raise UserError(f"--save {root}: cannot be read: {error.strerror}") from None


def explain_load_failure(root: Path) -> str | None:
    """Explain why ``--load ROOT`` contains no checkpoint to resume from, or return None."""
    try:
        found = find_foreign_checkpoint(root)
        lost = [] if found else list_checkpoints(root)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"--load {root}: cannot be read: {error.strerror}"
    if found is not None:
        return (
            f"--load {root}: {found.folder} is {found.title}: convert it first\n"
            f"  {conversion_commands(found, root)}"
        )
    if lost:
        return f"--load {root}: {lost[-1].folder} is {lost[-1].title}, so it may be incomplete"
    return None


def _check_contents(root: Path) -> list[str]:
    itself = recognize(root)
    if itself is not None:
        raise UserError(_refusal(root, itself))
    own = manifests.complete_iterations(root)
    found = find_foreign_checkpoint(root)
    if found is not None:
        raise UserError(_refusal(root, found))
    if own:
        return []
    lost = list_checkpoints(root)
    if lost:
        raise UserError(_refusal(root, lost[-1]))
    for file, name in read_trackers(root):
        raise UserError(
            f"--save {root}: {file.name} names checkpoint {name}, but there is no checkpoint: the "
            "run would start from iteration 1. Restore the checkpoints, or remove that file to "
            "start a new run"
        )
    return _check_other_files(root)


def _refusal(root: Path, found: FoundCheckpoint) -> str:
    what = f"--save {root}: " + ("" if found.folder == root else f"{found.folder} ")
    what += f"is {found.title}"
    if found.is_foreign:
        return (
            f"{what}, which this run would ignore and eventually overwrite. Use another --save "
            f"folder, or convert it:\n  {conversion_commands(found, root)}"
        )
    if (found.folder / manifests.MANIFEST).is_file():
        return f"{what}; use its parent folder: --save {root.parent}"
    return (
        f"{what}: it was copied incompletely, or its manifest was removed. This run would ignore "
        "it, start from iteration 1 and eventually overwrite it. Copy it again, or use another "
        "--save folder"
    )


def _check_other_files(root: Path) -> list[str]:
    """Check a folder without checkpoints: refuse foreign metrics, and note other files."""
    if _is_foreign_log(root / METRICS_FILE):
        raise UserError(
            f"--save {root}: its {METRICS_FILE} was written by another program, and this run would "
            "append to it. Use another folder"
        )
    others = sorted(p.name for p in root.iterdir() if p.name not in _RUN_FILES)
    others = [name for name in others if not name.startswith(".")]
    if not others:
        return []
    shown = ", ".join(others[:_MAX_LISTED]) + (", ..." if len(others) > _MAX_LISTED else "")
    return [f"--save {root} contains other files ({shown}); they are kept"]


def _is_foreign_log(path: Path) -> bool:
    """Whether the first lines of a JSON Lines file contain a record that is not from a run."""
    try:
        with path.open("rb") as stream:
            text = stream.read(1 << 16)
    except (FileNotFoundError, IsADirectoryError):
        return False
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(
            ValueError, RecursionError
        ):  # the line may be incomplete after a kill
            record = json.loads(line)
            if not isinstance(record, dict) or not record.keys() >= {"iteration"}:
                return True
    return False
