"""Plan and execution of a conversion."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from megatron_llmjp.checkpoint.save_folder import HUGGING_FACE
from megatron_llmjp.convert.copying.copy_threads import copy_tensors
from megatron_llmjp.convert.copying.output_folder import atomic_output_folder
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.rank_files import check_parallel_sizes
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.convert.opening import malformed_input, open_source
from megatron_llmjp.convert.optimizer import optimizer_state
from megatron_llmjp.convert.plan import OutputPlan, TensorCopy, TensorRead
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError


def pair_tensors(reads: dict[str, TensorRead], output: OutputPlan) -> list[TensorCopy]:
    """Pair every tensor to read with its location in the output.

    Raises:
        ValueError: the names of the two sides differ, a bug in a format.
    """
    if reads.keys() != output.writes.keys():
        odd = sorted(reads.keys() ^ output.writes.keys())
        raise ValueError(f"names only in the source or only in the target: {odd[:5]}")
    return [TensorCopy(name, read, output.writes[name]) for name, read in reads.items()]


class VerificationError(Exception):
    """Source and output compute different logits."""


@dataclass
class Conversion:
    """A planned conversion."""

    source: SourceCheckpoint
    target: str
    output: OutputPlan
    copies: list[TensorCopy]
    options: ConversionOptions = field(default_factory=ConversionOptions)

    def checksum_ranges(self) -> list[ChecksumRange]:
        """Return all ranges of the source files that have a checksum."""
        reads = [copy.read for copy in self.copies]
        stored = [part for read in reads for part in (*read.parts, *read.replicas)]
        return list(dict.fromkeys(found for part in stored for found in part.checksum_ranges))

    def run(
        self, path: Path, workers: int, quiet: bool, verify: Callable[[Path], None] | None
    ) -> float:
        """Execute the conversion; ``path`` is created only on success, including ``verify``.

        Args:
            path: the output folder.
            workers: number of copying threads.
            quiet: hide the progress bar.
            verify: checks the complete output before it is renamed to ``path``.

        Returns:
            Seconds until the output was synced to disk, without ``verify``.

        Raises:
            UserError: a file is damaged, the disk is full, or the target exists.
        """
        check_output_path(path, self.source.path)
        path = path.absolute()
        begin, checking = time.monotonic(), 0.0
        with atomic_output_folder(path, self.output.nbytes) as folder:
            sums = copy_tensors(self.copies, self.output.files, folder, workers, quiet)
            if self.options.checksums:
                for checksum_range in self.checksum_ranges():
                    checksum_range.finish()
            self.output.finish(folder, sums)
            if verify is not None:
                paused = time.monotonic()
                verify(folder)
                checking = time.monotonic() - paused
        return time.monotonic() - begin - checking


def check_output_path(output: Path, source: Path) -> None:
    """Refuse an output that is the source, inside the source, or a symbolic link.

    Raises:
        UserError: the output is one of these.
    """
    if output.is_symlink():
        raise UserError(f"--output {output}: is a symbolic link; give the folder itself")
    place, root = output.resolve(), source.resolve()
    if place == root or root in place.parents:
        raise UserError(
            f"--output {output}: is inside the source, which is never modified: {source}"
        )


def _vocabulary_notes(source: SourceCheckpoint, output: OutputPlan) -> list[str]:
    """Return a note if the padded vocabulary size changes."""
    before, after = source.padded_vocab_size, output.writes[WORD_EMBEDDINGS].padded_vocab_size
    if after is None or after == before:
        return []
    if after < before:
        return [
            f"vocabulary: rows {after} to {before - 1} of {before} are padding and were removed"
        ]
    return [f"vocabulary: {after - before} padding rows were added to {before}"]


def _check_options(source: SourceCheckpoint, target: str, options: ConversionOptions) -> None:
    """Check the options against the source and the target's format.

    Raises:
        UserError: an option is invalid.
    """
    entry = FORMATS[target]
    stages = 1 if entry.has_pipeline_stages else options.pipeline_parallel
    check_parallel_sizes(source.model, options.tensor_parallel, stages)
    path, rows = source.path, source.padded_vocab_size
    if options.vocab_size is not None and options.vocab_size > rows:
        raise UserError(
            f"--vocab-size {options.vocab_size}: larger than the padded vocabulary size "
            f"{rows} of {path}"
        )
    if options.vocab_size is None and (size := source.model.vocab_size or 0) > rows:
        raise UserError(
            f"{path}: vocabulary size {size} is larger than the padded vocabulary size "
            f"{rows}; give --vocab-size"
        )
    if not entry.stores_tokenizer and (options.tokenizer or options.tokenizer_type):
        raise UserError(
            f"--tokenizer, --tokenizer-type: {target} checkpoints do not contain a tokenizer"
        )
    if not entry.has_pipeline_stages and (given := options.stage_flags):
        raise UserError(f"{', '.join(given)}: {target} checkpoints load with any pipeline stages")
    if options.chat_template is not None and not entry.stores_tokenizer:
        raise UserError(f"--chat-template: {target} checkpoints do not contain a tokenizer")
    if options.with_optimizer and (options.average or options.adapter):
        flag = "--average" if options.average else "--adapter"
        raise UserError(
            f"--with-optimizer: {flag} changes the weights, and Adam's moments and fp32 weights "
            "belong to the original ones; omit --with-optimizer"
        )
    if options.with_optimizer and not entry.writes_optimizer:
        raise UserError(f"--with-optimizer: writing optimizer state to {target} is not supported")


def plan_conversion(
    source_format: str | None, target: str, path: Path, options: ConversionOptions
) -> Conversion:
    """Open the source, check its tensors, and plan the output.

    Args:
        source_format: name of the source's format; None detects it.
        target: name of the output's format.
        path: folder of the source; not used if several are averaged.
        options: the user's options.

    Raises:
        UserError: the source is incomplete or damaged, an option is invalid, or the target does not
            support the model.
    """
    source = open_source(source_format, path, options)
    _check_options(source, target, options)
    if options.vocab_size is not None:
        source.model = source.model.model_copy(update={"vocab_size": options.vocab_size})
    entry = FORMATS[target]
    has_state = source.optimizer is not None or not entry.creates_optimizer
    with_state = options.with_optimizer and has_state
    if with_state:
        with malformed_input(path):
            source = optimizer_state.open_optimizer_state(source, options)
    try:
        output = entry.plan(source, options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place} = {first['input']!r}: {first['msg']}") from None
    if options.like is not None and target != HUGGING_FACE:
        from megatron_llmjp.convert.formats.hugging_face.reference_model import check_import

        output.warnings += check_import(source, options)
    reads = source.reads
    if with_state:
        with malformed_input(path):
            state = optimizer_state.read_optimizer_state(source)
        reads = reads | optimizer_state.optimizer_reads(source, state, options)
    output.notes += _vocabulary_notes(source, output)
    copies = pair_tensors(reads, output)
    return Conversion(source, target, output, copies, options)
