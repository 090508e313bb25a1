"""Whose checkpoints a folder holds, by the names of its files. Nothing is opened; without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests

NATIVE = "native"
HUGGING_FACE = "hf"
MEGATRON_LM = "megatron-lm"
MEGATRON_DEEPSPEED = "megatron-deepspeed"
LATEST = "latest"
"""Megatron-DeepSpeed's tracker."""

_CHECKPOINT = re.compile(r"iter_\d+|release|global_step\d+")
"""Folders that Megatron-LM, Megatron-DeepSpeed and this program save to."""
_OWN = (manifests.CONFIG, manifests.FOLDS)
"""Files that no other program writes; Megatron-LM from core 0.20 on has a ``tokenizer``, too."""


@dataclass(frozen=True)
class Found:
    """A checkpoint, or what is left of one."""

    folder: Path
    format: str | None
    """As ``convert_checkpoint --from`` names it; None where the files do not show it."""
    title: str
    """In words, with an article."""

    @property
    def is_foreign(self) -> bool:
        """Whether another program saved it."""
        return self.format not in (NATIVE, None)


def recognize(folder: Path) -> Found | None:
    """What one folder is, apart from the folders in it; None for no checkpoint.

    Raises:
        OSError: the folder cannot be read.
    """
    names = {path.name for path in folder.iterdir()}
    if manifests.MANIFEST in names:
        return Found(folder, NATIVE, "a checkpoint of this program")
    if "config.json" in names and _any(names, r".*\.safetensors|pytorch_model.*|model\.safe.*"):
        return Found(folder, HUGGING_FACE, "a Hugging Face model")
    if _any(names, r"mp_rank_\d+.*_model_states\.pt|layer_\d+-model_.*\.pt"):
        return Found(folder, MEGATRON_DEEPSPEED, "a Megatron-DeepSpeed checkpoint")
    if _any(names, r"mp_rank_\d+.*"):
        title = "a Megatron-LM checkpoint (--ckpt-format torch, one folder per rank)"
        return Found(folder, MEGATRON_LM, title)
    if any(name in names for name in _OWN) and ("config.json" not in names):
        return Found(folder, NATIVE, f"a checkpoint of this program without {manifests.MANIFEST}")
    if ".metadata" in names and {"common.pt", "metadata.json"} & names:
        return Found(folder, MEGATRON_LM, "a Megatron-LM checkpoint (--ckpt-format torch_dist)")
    if ".metadata" in names or _any(names, r".*\.distcp"):
        return Found(folder, None, "a part of a torch_dist checkpoint")
    return None


def checkpoints(root: Path) -> list[Found]:
    """Checkpoints in a folder by their names (``iter_*``, ``release``, ``global_step*``).

    The last one is the newest. A folder that is named so and holds nothing known is listed, too.

    Raises:
        OSError: the folder cannot be read.
    """
    names = [p.name for p in root.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    found = []
    for name in sorted(names, key=lambda name: int("0" + re.sub(r"\D", "", name))):
        what = recognize(root / name)
        found.append(what or Found(root / name, None, "a checkpoint with no files that are known"))
    return found


def foreign(root: Path) -> Found | None:
    """The newest checkpoint of another program: the folder itself, or one in it.

    Raises:
        OSError: the folder cannot be read.
    """
    itself = recognize(root)
    if itself is not None:
        return itself if itself.is_foreign else None
    return next((found for found in reversed(checkpoints(root)) if found.is_foreign), None)


def trackers(root: Path) -> Iterator[tuple[Path, str]]:
    """Tracker files that name a checkpoint, and the name."""
    for file, pattern in ((manifests.TRACKER, r"\d+|release"), (LATEST, r"global_step\d+")):
        try:
            text = (root / file).read_bytes()[:100].decode(errors="replace").strip()
        except OSError:
            continue
        if re.fullmatch(pattern, text):
            yield root / file, text


def conversion(found: Found, root: Path) -> str:
    """How to convert another program's checkpoint and train from it, as commands."""
    output = f"{str(root).rstrip('/')}-native"
    if found.format == HUGGING_FACE:
        flags, start = "", f"--load {output} --finetune"
    else:
        flags, start = " --with-optimizer", f"--load {output}"
    return (
        f"convert_checkpoint --from {found.format} --to native{flags} --input {found.folder} "
        f"--output {output}\n"
        f"  then train with {start} and a --save folder of its own"
    )


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)
