"""A conversion from start to end: plan, workers, progress, and publishing the result.

Carrying out a plan: workers copy tensors, progress is shown, the result appears when complete.

The output is built in a hidden folder beside its final place, forced to disk, and renamed. An
interrupted conversion leaves at most that folder, which the next one starts by removing.

One conversion from beginning to end.
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

from megatron_llmjp.convert import optimizer_state
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.rank_files import check_parallel_sizes
from megatron_llmjp.convert.formats.registry import FORMATS, check_is_folder, detect_format
from megatron_llmjp.convert.plan import Checksums, OutputPlan, TensorCopy, TensorRead
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import FileLock, acquire_lock, fsync_path


def pair_tensors(reads: dict[str, TensorRead], output: OutputPlan) -> list[TensorCopy]:
    """Pair every tensor that is read with its place in the output.

    Raises:
        ValueError: the two sides disagree on names, which is a bug of a format.
    """
    if reads.keys() != output.writes.keys():
        odd = sorted(reads.keys() ^ output.writes.keys())
        raise ValueError(f"source and target disagree on {odd[:5]}")
    return [TensorCopy(name, read, output.writes[name]) for name, read in reads.items()]


@contextmanager
def atomic_output_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Args:
        target: the final place, which must not exist.
        nbytes: what will be written; refused beforehand when the disk cannot hold it.

    Raises:
        UserError: the target exists, cannot be written, is being written, or does not fit.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; choose another --output or remove it")
    partial = target.with_name(f".{target.name}.partial")
    lock = _lock(target)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if nbytes > free:
            raise UserError(
                f"{target.parent}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            )
        yield partial
        _sync(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        fsync_path(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release(remove=True)


def _lock(target: Path) -> FileLock:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return acquire_lock(target.with_name(f".{target.name}.lock"))
    except BlockingIOError:
        raise UserError(f"{target}: another conversion is writing it") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be made: {error.strerror}") from error


def _sync(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        fsync_path(path)


def copy_tensors(
    copies: Sequence[TensorCopy], output: OutputPlan, folder: Path, workers: int, quiet: bool
) -> Checksums:
    """Make the files and copy every tensor, in ``workers`` threads.

    Threads do: reading, writing, sums and copies of memory all leave Python to others meanwhile.
    Together they hold no more in memory than the largest tensor needs alone.

    Returns:
        The CRC-32 of what was written, where a file asks for it.

    Raises:
        UserError: a source file is damaged, or the disk is full.
    """
    for file in output.files:
        file.create(folder)
    progress = ProgressBar(sum(copy.nbytes for copy in copies), quiet)
    memory = _Memory(max((copy.memory for copy in copies), default=0))
    sums: Checksums = {}
    # Largest first, so that no worker is left with the embedding at the end.
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


class _Memory:
    """Lets as many copies run at once as fit into a number of bytes."""

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
    """One rewritten line of gigabytes, speed and remaining time; silent without a terminal."""

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
    """Both sides of a conversion compute different logits."""


@dataclass
class Conversion:
    """A planned conversion."""

    source: SourceCheckpoint
    target: str
    output: OutputPlan
    copies: list[TensorCopy]
    checksums: bool = True
    """Compare the checksums of what was read, before the result appears."""

    def checksum_ranges(self) -> list[ChecksumRange]:
        """Everything that was read and has a checksum."""
        reads = [copy.read for copy in self.copies]
        stored = [part for read in reads for part in (*read.parts, *read.replicas)]
        return list(
            dict.fromkeys(
                checksum_range for part in stored for checksum_range in part.checksum_ranges
            )
        )

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
        UserError: it is not whole, or does not have what was asked for.
    """
    entry = FORMATS[name]
    if options.main_weights and not entry.has_main_weights:
        raise UserError(f"--main-weights is for megatron-deepspeed, {path} is {name}")
    if options.ignored_args and not entry.has_megatron_args:
        raise UserError(f"--ignore-args is for Megatron's checkpoints, {path} is {name}")
    return entry.read(path, options)


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


def _changed_rows(source: SourceCheckpoint, output: OutputPlan) -> list[str]:
    """Rows of the vocabulary that are dropped or added."""
    before, after = source.padded_vocab_size, output.writes[WORD_EMBEDDINGS].padded_vocab_size
    if after is None or after == before:
        return []
    if after < before:
        return [f"vocabulary: rows {after} to {before - 1} of {before} were dropped as padding"]
    return [f"vocabulary: {after - before} rows of padding were added to {before}"]


def plan_conversion(
    source_format: str | None, target: str, path: Path, options: ConversionOptions
) -> Conversion:
    """Open the source, account for its tensors, and lay out the target.

    Raises:
        UserError: the source is not whole, or the target cannot hold it.
    """
    check_is_folder(path)
    try:
        source = open_checkpoint(source_format or detect_format(path).name, path, options).check()
    except _FOREIGN as error:
        raise UserError(f"{path}: damaged, or of a form that is not known ({error!r})") from error
    check_parallel_sizes(source.model, options.tensor_parallel, options.pipeline_parallel)
    if options.vocab_size is not None:
        if options.vocab_size > source.padded_vocab_size:
            raise UserError(
                f"--vocab-size {options.vocab_size}: {path} has {source.padded_vocab_size} rows"
            )
        source.model = source.model.model_copy(update={"vocab_size": options.vocab_size})
    if (size := source.model.vocab_size or 0) > source.padded_vocab_size:
        raise UserError(
            f"{path}: a vocabulary of {size} in {source.padded_vocab_size} rows; give --vocab-size"
        )
    entry = FORMATS[target]
    if not entry.stores_tokenizer and (options.tokenizer or options.tokenizer_type):
        raise UserError(f"--tokenizer, --tokenizer-type: {target} checkpoints hold no tokenizer")
    if options.with_optimizer and not entry.writes_optimizer:
        raise UserError(f"--with-optimizer: no optimizer state is written for {target}")
    has_state = source.optimizer is not None or not entry.creates_optimizer
    with_state = options.with_optimizer and has_state
    if with_state:
        source = optimizer_state.open_optimizer_state(source, options)
    try:
        output = entry.plan(source, options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place} = {first['input']!r}: {first['msg']}") from None
    reads = source.reads
    if with_state:
        reads = reads | optimizer_state.optimizer_reads(
            source, optimizer_state.read_optimizer_state(source), options
        )
    output.notes += _changed_rows(source, output)
    copies = pair_tensors(reads, output)
    return Conversion(source, target, output, copies, options.checksums)
