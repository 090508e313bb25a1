"""Conversion of a checkpoint: plan, copying threads, progress, and atomic output folder.

The output is written to a hidden folder next to the output folder, synced to disk and renamed. A
killed conversion leaves at most the hidden folder, which the next conversion removes first.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from megatron_llmjp.checkpoint.save_folder import HUGGING_FACE
from megatron_llmjp.convert import optimizer_state
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.rank_files import check_parallel_sizes
from megatron_llmjp.convert.formats.registry import FORMATS, check_is_folder, detect_format
from megatron_llmjp.convert.plan import Checksums, OutputPlan, TensorCopy, TensorRead
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import FileLock, acquire_lock, fsync_path

_MALFORMED_INPUT_ERRORS = (
    *(AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError),
    *(RecursionError, MemoryError, OSError, RuntimeError),
)
"""Exceptions that readers raise on files with unexpected content."""

MAX_PROBLEM = 300
"""Characters of such an exception in a message."""


def pair_tensors(reads: dict[str, TensorRead], output: OutputPlan) -> list[TensorCopy]:
    """Pair every tensor to read with its location in the output.

    Raises:
        ValueError: the names of the two sides differ, a bug in a format.
    """
    if reads.keys() != output.writes.keys():
        odd = sorted(reads.keys() ^ output.writes.keys())
        raise ValueError(f"names only in the source or only in the target: {odd[:5]}")
    return [TensorCopy(name, read, output.writes[name]) for name, read in reads.items()]


@contextmanager
def atomic_output_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Yield a folder that is renamed to ``target`` on success and removed on an exception.

    Args:
        target: the output folder, which must not exist.
        nbytes: size of the output, compared with the free disk space first.

    Raises:
        UserError: the target exists, cannot be written, is being written by another process, or
            is larger than the free disk space.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another --output or remove it")
    partial = target.with_name(f".{target.name}.partial")
    lock = _lock_output(target)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if nbytes > free:
            raise UserError(
                f"{target.parent}: {nbytes / 1e9:.1f} GB required, {free / 1e9:.1f} GB free"
            )
        yield partial
        _sync(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        fsync_path(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written: {error.strerror or error}; the incomplete output was "
            "removed"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release(remove=True)


def _lock_output(target: Path) -> FileLock:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return acquire_lock(target.with_name(f".{target.name}.lock"))
    except BlockingIOError:
        raise UserError(f"{target}: is being written by another conversion") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be created: {error.strerror}") from error


def _sync(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        fsync_path(path)


def copy_tensors(
    copies: Sequence[TensorCopy], output: OutputPlan, folder: Path, workers: int, quiet: bool
) -> Checksums:
    """Create the output files and copy every tensor, in ``workers`` threads.

    Threads suffice: reading, writing, checksums and copies of memory release the GIL. All threads
    together use no more memory than the largest tensor alone.

    Returns:
        CRC-32 of the slots that store one.

    Raises:
        UserError: a source file is damaged, or the disk is full.
    """
    for file in output.files:
        file.create(folder)
    progress = ProgressBar(sum(copy.nbytes for copy in copies), quiet)
    memory = _MemoryLimit(max((copy.memory for copy in copies), default=0))
    sums: Checksums = {}
    # Largest first, so that the last copies are small and all threads finish together.
    order = sorted(copies, key=lambda copy: -copy.nbytes)
    share = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers, "copy", torch.set_num_threads, (share,)) as pool:
        futures = {pool.submit(memory.run, copy, folder): copy for copy in order}
        try:
            for future in as_completed(futures):
                sums |= future.result()
                progress.add(futures[future].nbytes)
        finally:
            pool.shutdown(cancel_futures=True)
    progress.close()
    return sums


class _MemoryLimit:
    """Limits the memory of concurrent copies to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._free, self._changed = limit, threading.Condition()

    def run(self, copy: TensorCopy, folder: Path) -> Checksums:
        with self._changed:
            self._changed.wait_for(lambda: copy.memory <= self._free)
            self._free -= copy.memory
        try:
            return copy.run(folder)
        finally:
            with self._changed:
                self._free += copy.memory
                self._changed.notify_all()


class ProgressBar:
    """Progress bar with gigabytes, throughput and remaining time; hidden without a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done, self._begin = total, 0, time.monotonic()
        self._show = not quiet and sys.stderr.isatty()
        self._last = 0.0

    def add(self, nbytes: int) -> None:
        """Count bytes written."""
        self._done += nbytes
        now = time.monotonic()
        if self._show and (now - self._last > 0.2 or self._done == self._total):
            self._last = now
            speed = self._done / max(now - self._begin, 1e-3)
            left = (self._total - self._done) / max(speed, 1.0)
            share = self._done / max(self._total, 1)
            bar = ("#" * int(30 * share)).ljust(30)
            sys.stderr.write(
                f"\r[{bar}] {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
                f"{speed / 1e9:.2f} GB/s, {left:.0f} s left "
            )
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._show:
            sys.stderr.write("\n")


class VerificationError(Exception):
    """Source and output compute different logits."""


@dataclass
class Conversion:
    """A planned conversion."""

    source: SourceCheckpoint
    target: str
    output: OutputPlan
    copies: list[TensorCopy]
    checksums: bool = True
    """Verify the checksums of the source files before the output folder is created."""

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
        _check_output_path(path, self.source.path)
        path = path.absolute()
        begin, checking = time.monotonic(), 0.0
        with atomic_output_folder(path, self.output.nbytes) as folder:
            sums = copy_tensors(self.copies, self.output, folder, workers, quiet)
            if self.checksums:
                for checksum_range in self.checksum_ranges():
                    checksum_range.finish()
            self.output.finish(folder, sums)
            if verify is not None:
                paused = time.monotonic()
                verify(folder)
                checking = time.monotonic() - paused
        return time.monotonic() - begin - checking


def open_checkpoint(name: str, path: Path, options: ConversionOptions) -> SourceCheckpoint:
    """Open a checkpoint of a format.

    Raises:
        UserError: the checkpoint is incomplete, or an option does not apply to it.
    """
    entry = FORMATS[name]
    if options.main_weights and not entry.has_main_weights:
        raise UserError(f"--main-weights: not supported for {name} checkpoints: {path}")
    if options.ignored_args and not entry.has_megatron_args:
        raise UserError(f"--ignore-args: not supported for {name} checkpoints: {path}")
    return entry.read(path, options)


def _check_output_path(output: Path, source: Path) -> None:
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
    check_parallel_sizes(source.model, options.tensor_parallel, options.pipeline_parallel)
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
    entry = FORMATS[target]
    if not entry.stores_tokenizer and (options.tokenizer or options.tokenizer_type):
        raise UserError(
            f"--tokenizer, --tokenizer-type: {target} checkpoints do not contain a tokenizer"
        )
    if options.with_optimizer and not entry.writes_optimizer:
        raise UserError(f"--with-optimizer: writing optimizer state to {target} is not supported")


@contextmanager
def _malformed_input(path: Path) -> Iterator[None]:
    """Convert the errors of readers on files with unexpected content to user errors."""
    try:
        yield
    except _MALFORMED_INPUT_ERRORS as error:
        problem = repr(error)[:MAX_PROBLEM]
        raise UserError(f"{path}: damaged, or not in a supported format ({problem})") from error


def plan_conversion(
    source_format: str | None, target: str, path: Path, options: ConversionOptions
) -> Conversion:
    """Open the source, check its tensors, and plan the output.

    Args:
        source_format: name of the source's format; None detects it.
        target: name of the output's format.
        path: folder of the source.
        options: the user's options.

    Raises:
        UserError: the source is incomplete or damaged, an option is invalid, or the target does not
            support the model.
    """
    check_is_folder(path)
    with _malformed_input(path):
        source = open_checkpoint(source_format or detect_format(path).name, path, options).check()
    _check_options(source, target, options)
    if options.vocab_size is not None:
        source.model = source.model.model_copy(update={"vocab_size": options.vocab_size})
    entry = FORMATS[target]
    has_state = source.optimizer is not None or not entry.creates_optimizer
    with_state = options.with_optimizer and has_state
    if with_state:
        with _malformed_input(path):
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
        with _malformed_input(path):
            state = optimizer_state.read_optimizer_state(source)
        reads = reads | optimizer_state.optimizer_reads(source, state, options)
    output.notes += _vocabulary_notes(source, output)
    copies = pair_tensors(reads, output)
    return Conversion(source, target, output, copies, options.checksums)
