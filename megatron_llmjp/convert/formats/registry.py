"""Registry of the checkpoint formats: description, detection, reader, writer and verification.

An entry of :data:`FORMATS` is all that a format needs: the choices and the help of
``convert_checkpoint``, ``inspect``, detection and the table in docs/convert.md are made from it.
Readers and writers are imported when they are called, so that ``--help`` does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.checkpoint.save_folder import (
    HUGGING_FACE,
    MEGATRON_DEEPSPEED,
    MEGATRON_LM,
    NATIVE,
    list_checkpoints,
    recognize,
)
from megatron_llmjp.errors import UserError, download_hint

if TYPE_CHECKING:
    import torch

    from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
    from megatron_llmjp.convert.plan import OutputPlan

    Reader = Callable[[Path, ConversionOptions], SourceCheckpoint]
    Planner = Callable[[SourceCheckpoint, ConversionOptions], OutputPlan]
    Logits = Callable[
        [SourceCheckpoint, torch.Tensor, torch.dtype | None, frozenset[str]], torch.Tensor
    ]


@dataclass(frozen=True)
class Verification:
    """Computation of a checkpoint's logits for ``--verify``, independent of the converter.

    Attributes:
        logits: returns fp32 logits ``[batch, length, padded vocabulary]`` of tokens
            ``[batch, length]``. Arguments: the checkpoint, of which the path and the format are
            used; the tokens; the dtype to which the weights are rounded first, or None; names of
            Megatron arguments to ignore.
        program: how the logits are computed; ``{package}`` becomes the version of the package.
    """

    logits: Logits
    program: str


@dataclass(frozen=True)
class CheckpointFormat:
    """A checkpoint format.

    Attributes:
        name: the value of ``--from`` and ``--to``.
        description: programs and files, as Markdown: a row of the table in docs/convert.md.
        detect: returns whether a folder holds a checkpoint of this format, by file names.
        read: opens a checkpoint.
        plan: lays out the output files.
        verification: None if ``--verify`` is not supported.
        has_main_weights: whether the reader supports ``--main-weights``.
        has_megatron_args: whether the reader supports ``--ignore-args``.
        stores_tokenizer: whether the writer supports ``--tokenizer`` and ``--tokenizer-type``.
        writes_optimizer: whether the writer supports ``--with-optimizer``.
        has_pipeline_stages: whether the output depends on the division into pipeline stages.
        creates_optimizer: whether the writer writes zero moments if the source has no optimizer.
        has_checksums: whether the files have checksums of their own.
    """

    name: str
    description: str
    detect: Callable[[Path], bool]
    read: Reader
    plan: Planner
    verification: Verification | None = None
    has_main_weights: bool = False
    has_megatron_args: bool = False
    stores_tokenizer: bool = False
    writes_optimizer: bool = False
    has_pipeline_stages: bool = False
    creates_optimizer: bool = False
    has_checksums: bool = True


def _recognized(path: Path) -> str | None:
    """Return the format of a folder or of the newest checkpoint in it, by file names."""
    found = recognize(path) or next(reversed(list_checkpoints(path)), None)
    return None if found is None else found.format


def _is_native(path: Path) -> bool:
    return bool(complete_iterations(path)) or _recognized(path) == NATIVE


def _read_native(path: Path, options: ConversionOptions) -> SourceCheckpoint:
    from megatron_llmjp.convert.formats import native

    return native.read_native(path, options.checksums)


def _plan_native(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    from megatron_llmjp.convert.formats import native

    return native.plan_native(source, options)


def _native_logits(
    source: SourceCheckpoint, tokens: torch.Tensor, dtype: torch.dtype | None, _: frozenset[str]
) -> torch.Tensor:
    from megatron_llmjp.convert.verification import logits

    return logits.native_logits(source, tokens, dtype)


def _is_hugging_face(path: Path) -> bool:
    found = _recognized(path)
    return found == HUGGING_FACE or (found is None and (path / "config.json").is_file())


def _read_hugging_face(path: Path, _: ConversionOptions) -> SourceCheckpoint:
    from megatron_llmjp.convert.formats.hugging_face import folder

    return folder.read_hugging_face(path)


def _plan_hugging_face(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    from megatron_llmjp.convert.formats.hugging_face import folder

    return folder.plan_hugging_face(source, options)


def _hugging_face_logits(
    source: SourceCheckpoint, tokens: torch.Tensor, dtype: torch.dtype | None, _: frozenset[str]
) -> torch.Tensor:
    from megatron_llmjp.convert.verification import logits

    return logits.hugging_face_logits(source, tokens, dtype)


def _is_megatron_lm(path: Path) -> bool:
    found = _recognized(path)
    if found is not None or (path / "config.json").is_file():
        return found == MEGATRON_LM
    patterns = (".metadata", "*/.metadata", "*/mp_rank_*/model_optim_rng.pt")
    return any(next(path.glob(pattern), None) for pattern in patterns)


def _read_megatron_lm(path: Path, options: ConversionOptions) -> SourceCheckpoint:
    from megatron_llmjp.convert.formats.megatron_lm import reader

    return reader.read_megatron_lm(path, options.ignored_args)


def _plan_megatron_lm(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    from megatron_llmjp.convert.formats.megatron_lm import writer

    return writer.plan_megatron_lm(source, options)


def _read_megatron_deepspeed(path: Path, options: ConversionOptions) -> SourceCheckpoint:
    from megatron_llmjp.convert.formats.megatron_deepspeed import reader

    return reader.read_megatron_deepspeed(path, options.main_weights, options.ignored_args)


def _plan_megatron_deepspeed(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    from megatron_llmjp.convert.formats.megatron_deepspeed import writer

    return writer.plan_megatron_deepspeed(source, options)


def _reference_logits(
    source: SourceCheckpoint,
    tokens: torch.Tensor,
    dtype: torch.dtype | None,
    ignored: frozenset[str],
) -> torch.Tensor:
    from megatron_llmjp.convert.verification import reference

    return reference.reference_logits(source, tokens, dtype, ignored)


_REFERENCE = Verification(
    _reference_logits,
    "plain PyTorch {torch}, from the run's args and each rank's tensors as they are stored",
)

FORMATS = {
    entry.name: entry
    for entry in (
        CheckpointFormat(
            NATIVE,
            "this project's checkpoints: `SAVE/iter_0001000/` with torch_dist files, "
            "`config.yaml`, `tokenizer/`, `manifest.json`",
            _is_native,
            _read_native,
            _plan_native,
            Verification(
                _native_logits,
                "megatron-core {megatron-core}, loaded as a run loads it, from config.yaml",
            ),
            stores_tokenizer=True,
            writes_optimizer=True,
        ),
        CheckpointFormat(
            HUGGING_FACE,
            "Hugging Face: `config.json` and safetensors files of the architectures below",
            _is_hugging_face,
            _read_hugging_face,
            _plan_hugging_face,
            Verification(
                _hugging_face_logits,
                "transformers {transformers}, from config.json and the weights' own names",
            ),
            stores_tokenizer=True,
            has_checksums=False,
        ),
        CheckpointFormat(
            MEGATRON_LM,
            "NVIDIA's and LLM-jp's Megatron-LM: `torch_dist`, or the older `torch` format with one "
            "file per rank",
            _is_megatron_lm,
            _read_megatron_lm,
            _plan_megatron_lm,
            _REFERENCE,
            has_megatron_args=True,
            writes_optimizer=True,
            has_pipeline_stages=True,
        ),
        CheckpointFormat(
            MEGATRON_DEEPSPEED,
            "LLM-jp v1.0's trainer: `global_step*/layer_*-model_*`, or one module per rank "
            "(`--no-pipeline`)",
            lambda path: _recognized(path) == MEGATRON_DEEPSPEED,
            _read_megatron_deepspeed,
            _plan_megatron_deepspeed,
            _REFERENCE,
            has_main_weights=True,
            has_megatron_args=True,
            writes_optimizer=True,
            has_pipeline_stages=True,
            creates_optimizer=True,
        ),
    )
}
"""The checkpoint formats by name; a folder has the first format that detects it."""


def detect_format(path: Path) -> CheckpointFormat:
    """Return the format of the checkpoint in a folder, by file names.

    Raises:
        UserError: the folder does not exist or holds no checkpoint of a known format.
    """
    check_is_folder(path)
    for entry in FORMATS.values():
        if entry.detect(path):
            return entry
    raise UserError(
        f"{path}: no checkpoint of a known format found; use --from "
        f"{'|'.join(FORMATS)} to see which files are missing"
    )


def check_is_folder(path: Path) -> None:
    """Check that ``--input`` is a folder.

    Raises:
        UserError: it is a file, or does not exist.
    """
    if path.is_file():
        raise UserError(f"--input {path}: is not a folder")
    if not path.is_dir():
        raise UserError(f"--input {path}: does not exist{download_hint(path)}")
