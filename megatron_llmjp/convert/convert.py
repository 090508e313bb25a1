"""One conversion from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from megatron_llmjp.convert import engine, optimizer_state
from megatron_llmjp.convert.detect import check_is_folder, detect, planner, reader
from megatron_llmjp.convert.formats import Options, Source
from megatron_llmjp.convert.megatron_ranks import check_divides
from megatron_llmjp.convert.plan import Copy, Output
from megatron_llmjp.convert.regions import Region
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError


class Difference(Exception):
    """Both sides of a conversion compute different logits."""


@dataclass
class Conversion:
    """A planned conversion."""

    source: Source
    target: str
    output: Output
    copies: list[Copy]
    checksums: bool = True
    """Compare the checksums of what was read, before the result appears."""

    def regions(self) -> list[Region]:
        """Everything that was read and has a checksum."""
        reads = [copy.read for copy in self.copies]
        stored = [part for read in reads for part in (*read.parts, *read.replicas)]
        return list(dict.fromkeys(region for part in stored for region in part.regions))

    def run(
        self, path: Path, workers: int, quiet: bool, verify: Callable[[Path], None] | None
    ) -> float:
        """Carry it out; ``path`` appears when everything, ``verify`` included, went well.

        Returns:
            Seconds that it took until all was on disk, without ``verify``.

        Raises:
            UserError: a file is damaged, the disk is full, or the target exists.
        """
        _check_place(path, self.source.path)
        path = path.absolute()
        begin, checking = time.monotonic(), 0.0
        with engine.new_folder(path, self.output.nbytes) as folder:
            sums = engine.run(self.copies, self.output, folder, workers, quiet)
            if self.checksums:
                for region in self.regions():
                    region.finish()
            self.output.finish(folder, sums)
            if verify is not None:
                paused = time.monotonic()
                verify(folder)
                checking = time.monotonic() - paused
        return time.monotonic() - begin - checking


def open_source(name: str, path: Path, options: Options) -> Source:
    """Open a checkpoint of a format.

    Raises:
        UserError: it is not whole, or does not have what was asked for.
    """
    if options.main_weights and name != "megatron-deepspeed":
        raise UserError(f"--main-weights is for megatron-deepspeed, {path} is {name}")
    if options.ignored_args and name not in ("megatron-lm", "megatron-deepspeed"):
        raise UserError(f"--ignore-args is for Megatron's checkpoints, {path} is {name}")
    return reader(name)(path, options)


_FOREIGN = (
    *(AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError),
    *(RecursionError, MemoryError, OSError, RuntimeError),
)
"""What content of another form than expected raises, wherever it is looked into."""


def _check_place(output: Path, source: Path) -> None:
    """Refuse an output that is the source or inside it, and one that is a link.

    Raises:
        UserError: naming both.
    """
    if output.is_symlink():
        raise UserError(f"--output {output}: is a symbolic link; name the folder itself")
    place, root = output.resolve(), source.resolve()
    if place == root or root in place.parents:
        raise UserError(
            f"--output {output}: is inside the source, which is never written: {source}"
        )


def _changed_rows(source: Source, output: Output) -> list[str]:
    """Rows of the vocabulary that are dropped or added."""
    before, after = source.rows, output.writes[WORD_EMBEDDINGS].rows
    if after is None or after == before:
        return []
    if after < before:
        return [f"vocabulary: rows {after} to {before - 1} of {before} were dropped as padding"]
    return [f"vocabulary: {after - before} rows of padding were added to {before}"]


def prepare(source_format: str | None, target: str, path: Path, options: Options) -> Conversion:
    """Open the source, account for its tensors, and lay out the target.

    Raises:
        UserError: the source is not whole, or the target cannot hold it.
    """
    check_is_folder(path)
    try:
        source = open_source(source_format or detect(path), path, options).check()
    except _FOREIGN as error:
        raise UserError(f"{path}: damaged, or of a form that is not known ({error!r})") from error
    check_divides(source.model, options.tensor_parallel, options.pipeline_parallel)
    if options.vocab_size is not None:
        if options.vocab_size > source.rows:
            raise UserError(f"--vocab-size {options.vocab_size}: {path} has {source.rows} rows")
        source.model = source.model.model_copy(update={"vocab_size": options.vocab_size})
    if (size := source.model.vocab_size or 0) > source.rows:
        raise UserError(f"{path}: a vocabulary of {size} in {source.rows} rows; give --vocab-size")
    if target.startswith("megatron") and (options.tokenizer or options.tokenizer_type):
        raise UserError(f"--tokenizer, --tokenizer-type: {target} checkpoints hold no tokenizer")
    if options.with_optimizer and target not in ("native", "megatron-deepspeed"):
        raise UserError(f"--with-optimizer: no optimizer state is written for {target}")
    # For Megatron-DeepSpeed moments of zero will do.
    with_state = options.with_optimizer and (target == "native" or source.optimizer is not None)
    if with_state:
        source = optimizer_state.opened(source, options)
    try:
        output = planner(target)(source, options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place} = {first['input']!r}: {first['msg']}") from None
    reads = source.reads
    if with_state:
        reads = reads | optimizer_state.reads_of(source, optimizer_state.of_source(source), options)
    output.notes += _changed_rows(source, output)
    copies = engine.match(reads, output)
    return Conversion(source, target, output, copies, options.checksums)
