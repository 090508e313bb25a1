"""Conversion of checkpoints."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from megatron_llmjp.api.errors import OperationError, raises_user_errors
from megatron_llmjp.config.schema import ParallelConfig
from megatron_llmjp.convert.conversion import VerificationError, plan_conversion
from megatron_llmjp.convert.files.storage import DTYPES
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        path: the output folder.
        format: its format.
        parameters: number of parameters, padding of the vocabulary included.
        seconds: duration, until the output was synced to disk.
        notes: notes and warnings of the conversion.
        verification: what ``verify`` compared; empty without it.
    """

    path: Path
    format: str
    parameters: int
    seconds: float
    notes: tuple[str, ...]
    verification: str


@raises_user_errors
def convert_checkpoint(
    source: str | PathLike[str],
    output: str | PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    tokenizer: str | PathLike[str] | None = None,
    tokenizer_type: str | None = None,
    chat_template: str | PathLike[str] | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    with_optimizer: bool = False,
    verify: bool = False,
    workers: int = 4,
) -> Converted:
    """Convert a checkpoint to another format; the source's is detected.

    Args:
        source: a checkpoint, or the folder of a run, whose newest checkpoint is converted.
        output: folder to create; it exists only if the conversion succeeds.
        to: ``hf``, ``native``, ``megatron-lm`` or ``megatron-deepspeed``.
        dtype: type of the weights, such as ``bf16``; by default the source's.
        tokenizer: folder or file; by default the source's own.
        tokenizer_type: of the run; by default the source's own.
        chat_template: file of a chat template to store.
        tensor_parallel: tensor parallel size of the output.
        pipeline_parallel: pipeline parallel size of the output.
        with_optimizer: whether to convert the optimizer state, too.
        verify: compare the logits of both models.
        workers: number of copying threads.

    Raises:
        UserError: the source is incomplete or damaged, the output exists, or the target does not
            support the model.
        OperationError: the logits differ; the output is not created.

    Example:
        >>> found = ml.convert_checkpoint("checkpoints", "model-hf", to="hf")
        >>> found.format, found.path.name, (found.path / "config.json").is_file()
        ('hf', 'model-hf', True)
    """
    if to not in FORMATS:
        raise UserError(f"to {to!r}: expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    options = ConversionOptions(
        dtype=None if dtype is None else DTYPES[dtype],
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
        ),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        tokenizer_type=tokenizer_type,
        chat_template=None if chat_template is None else Path(chat_template),
        with_optimizer=with_optimizer,
    )
    return _run(Path(source), Path(output), to, options, verify, workers)


def _run(
    source: Path, output: Path, to: str, options: ConversionOptions, verify: bool, workers: int
) -> Converted:
    conversion = plan_conversion(None, to, source, options)
    check = None
    if verify:
        from megatron_llmjp.convert.verification.verify import make_verifier

        check = make_verifier(conversion, options, tolerance=1e-4)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            seconds = conversion.run(output, workers, True, check)
    except VerificationError as error:
        raise OperationError(f"{error}; {output} was not created") from error
    return Converted(
        path=output,
        format=to,
        parameters=conversion.source.parameters,
        seconds=seconds,
        notes=(
            *conversion.source.notes,
            *conversion.output.notes,
            *conversion.output.warnings,
        ),
        verification=printed.getvalue(),
    )
