"""Which format a path holds, and who reads and writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.checkpoint.recognize import (
    HUGGING_FACE,
    MEGATRON_LM,
    NATIVE,
    checkpoints,
    recognize,
)
from megatron_llmjp.convert.formats import FORMATS, Options, Source
from megatron_llmjp.convert.plan import Output
from megatron_llmjp.errors import UserError, download_hint


def detect(path: Path) -> str:
    """The format of a checkpoint, told from the names of its files.

    Raises:
        UserError: it is none that is known.
    """
    check_is_folder(path)
    if complete_iterations(path):
        return NATIVE
    found = recognize(path) or next(reversed(checkpoints(path)), None)
    if found is not None and found.format is not None:
        return found.format
    if (path / "config.json").is_file():
        return HUGGING_FACE
    megatron = (".metadata", "*/.metadata", "*/mp_rank_*/model_optim_rng.pt")
    if any(next(path.glob(pattern), None) for pattern in megatron):
        return MEGATRON_LM
    raise UserError(
        f"{path}: holds no checkpoint of a known format; say --from "
        f"{'|'.join(FORMATS)} to learn what is missing"
    )


def check_is_folder(path: Path) -> None:
    """Refuse an ``--input`` that is no folder.

    Raises:
        UserError: it is a file, or does not exist.
    """
    if path.is_file():
        raise UserError(f"--input {path}: is not a folder")
    if not path.is_dir():
        raise UserError(f"--input {path}: does not exist{download_hint(path)}")


def reader(name: str) -> Callable[[Path, Options], Source]:
    """The function that opens a checkpoint of a format."""
    from megatron_llmjp.convert import hf, megatron_deepspeed, megatron_lm, native

    readers: dict[str, Callable[[Path, Options], Source]] = {
        "native": lambda path, _: native.read(path),
        "hf": lambda path, _: hf.read(path),
        "megatron-lm": lambda path, given: megatron_lm.read(path, given.ignored_args),
        "megatron-deepspeed": lambda path, given: megatron_deepspeed.read(
            path, given.main_weights, given.ignored_args
        ),
    }
    return readers[name]


def planner(name: str) -> Callable[[Source, Options], Output]:
    """The function that lays out a checkpoint of a format."""
    from megatron_llmjp.convert import hf, megatron_deepspeed_write, megatron_lm_write, native

    planners = {
        "native": native.plan,
        "hf": hf.plan,
        "megatron-lm": megatron_lm_write.plan,
        "megatron-deepspeed": megatron_deepspeed_write.plan,
    }
    return planners[name]
