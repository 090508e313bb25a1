"""Conversions that are divided over several tasks, such as those of a Slurm array.

Every task plans the whole conversion and writes its own output files into ``.OUTPUT.shards`` next
to the output folder. A file that is complete and on disk has a record there, with the checksums of
its tensors, so that a task that was lost continues with its first incomplete file, in any division.
Checksums of the source are divided among the tasks as well. The task that finds all records present
publishes the output: it links the files into a folder of its own, adds the small files, and renames
the folder. The rename decides which task publishes if several try, also on file systems without
locks. Writing a file again does no harm: its bytes are the same whenever they are written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.convert.conversion import Conversion, check_output_path
from megatron_llmjp.convert.copying.copy_threads import copy_tensors
from megatron_llmjp.convert.copying.output_folder import check_free_space, sync_folder
from megatron_llmjp.convert.copying.sharding import files_of_shard, restrict_copies, share_evenly
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.plan import Checksums, OutputFile
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import acquire_lock, fsync_path, write_atomically

PLAN = "plan.json"
"""Digest of the plan, in the work folder; of a published output, in ``.OUTPUT.plan.json``."""


@dataclass(frozen=True)
class ShardResult:
    """What a task did."""

    nbytes: int
    seconds: float
    pending: str
    """What other tasks still have to do; empty if the output folder exists."""

    def report(self, output: Path) -> str:
        """Return a line for the user."""
        size = self.nbytes / 1e9
        speed = size / max(self.seconds, 1e-3)
        text = f"wrote {size:.3f} GB in {self.seconds:.1f} s, {speed:.2f} GB/s; "
        if self.pending:
            return f"{text}{output} is created by the last task: {self.pending}"
        return f"{text}{output} is complete"


class ShardedConversion:
    """One task's part of a conversion."""

    def __init__(self, conversion: Conversion, output: Path, number: int, count: int) -> None:
        """Prepare the part of task ``number`` of ``count``.

        Raises:
            UserError: the output folder is not valid.
        """
        check_output_path(output, conversion.source.path)
        self._conversion, self._number, self._count = conversion, number, count
        self._target = output.absolute()
        self._staging = self._target.with_name(f".{self._target.name}.shards")
        self._folder, self._records = self._staging / "output", self._staging / "records"
        self._published = self._target.with_name(f".{self._target.name}.{PLAN}")
        self._digest = plan_digest(conversion)
        files = conversion.output.files
        self._names = {file.name: f"file-{index:05d}.json" for index, file in enumerate(files)}

    def run(self, workers: int, quiet: bool, verify: Callable[[Path], None] | None) -> ShardResult:
        """Write this task's files, and publish the output if it was the last task.

        Args:
            workers: number of copying threads.
            quiet: hide the progress bar.
            verify: checks the complete output before it is published.

        Raises:
            UserError: a file is damaged, the disk is full, the target exists, or a conversion with
                other arguments was started with the same output.
        """
        begin = time.monotonic()
        if self._is_published():
            return ShardResult(0, 0.0, "")
        nbytes = 0
        try:
            nbytes = self._write(workers, quiet)
            pending = self._pending() or self._publish(verify)
        except OSError as error:
            if not self._is_published():  # else another task has removed the work folder
                raise UserError(
                    f"{self._target}: cannot be written: {error.strerror or error}"
                ) from error
            pending = ""
        if pending and self._is_published():  # meanwhile
            pending = ""
        return ShardResult(nbytes, time.monotonic() - begin, pending)

    def _is_published(self) -> bool:
        """Return whether the output folder exists and was written by this conversion.

        Raises:
            UserError: it was not, or contains anything else.
        """
        if not self._target.exists() or (self._target.is_dir() and not any(self._target.iterdir())):
            return False
        files = self._conversion.output.files
        if all(_has_size(self._target, file) for file in files) and self._is_same_plan():
            return True
        raise UserError(f"{self._target}: already exists; choose another --output or remove it")

    def _is_same_plan(self) -> bool:
        """Return whether the plan of the published output is this one."""
        try:
            stored = json.loads(self._published.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(stored == self._digest)

    def _write(self, workers: int, quiet: bool) -> int:
        """Write this task's incomplete files; return their size."""
        for folder in (self._folder, self._records):
            folder.mkdir(parents=True, exist_ok=True)
        self._check_plan()
        if self._is_published():  # meanwhile
            shutil.rmtree(self._staging, ignore_errors=True)
            return 0
        plan = self._conversion
        own = files_of_shard(plan.output.files, plan.copies, self._number, self._count)
        files = [file for file in own if self._read_record(self._names[file.name]) is None]
        nbytes = sum(file.size for file in files)
        check_free_space(self._staging, nbytes)
        verified = self._choose_ranges()
        copies = restrict_copies(plan.copies, files)
        copy_tensors(copies, files, self._folder, workers, quiet, completed=self._write_record)
        if verified:
            for found in verified:
                found.finish()
            name = f"verified-{self._number}-of-{self._count}.json"
            self._save(name, [self._key(found) for found in verified])
        return nbytes

    def _check_plan(self) -> None:
        """Store the plan's digest, or compare it with the stored one.

        Raises:
            UserError: the plans differ.
        """
        path = self._staging / PLAN
        if not path.exists():
            temporary = path.with_name(f"{PLAN}.{socket.gethostname()}-{secrets.token_hex(4)}")
            write_atomically(temporary, json.dumps(self._digest))
            try:
                os.link(temporary, path)
            except FileExistsError:  # another task was first
                pass
            finally:
                temporary.unlink()
        if json.loads(path.read_text(encoding="utf-8")) != self._digest:
            raise UserError(
                f"{self._staging}: contains an unfinished conversion with other arguments, or the "
                "source has changed; repeat the same command, or remove the folder"
            )

    def _write_record(self, name: str, sums: Checksums) -> None:
        fsync_path((self._folder / name).parent)
        self._save(self._names[name], [[offset, crc] for (_, offset), crc in sums.items()])

    def _save(self, name: str, content: Any) -> None:
        write_atomically(self._records / name, json.dumps(content))

    def _read_record(self, name: str) -> Any:
        try:
            return json.loads((self._records / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _pending(self) -> str:
        """Return what has to be done before the output can be published."""
        files = self._conversion.output.files
        missing = [
            file.name
            for file in files
            if self._read_record(self._names[file.name]) is None
            or not _has_size(self._folder, file)
        ]
        if missing:
            return f"{len(missing)} of {len(files)} files are incomplete, such as {missing[0]}"
        left = {self._key(found) for found in self._ranges()} - self._verified()
        if left:
            return f"the checksums of {len(left)} parts of the source are not verified"
        return ""

    def _choose_ranges(self) -> list[ChecksumRange]:
        """Return the ranges of the source that this task verifies; the others are not computed."""
        ranges = self._ranges()
        done = self._verified()
        mine = {
            self._key(ranges[i])
            for i in share_evenly([found.length for found in ranges], self._number, self._count)
        } - done
        for found in ranges:
            found.is_skipped = self._key(found) not in mine
        return [found for found in ranges if not found.is_skipped]

    def _ranges(self) -> list[ChecksumRange]:
        ranges = self._conversion.checksum_ranges() if self._conversion.options.checksums else []
        return sorted(ranges, key=self._key)

    def _verified(self) -> set[str]:
        """Return the ranges of the source that some task has verified."""
        found = sorted(self._records.glob("verified-*.json"))
        return {key for path in found for key in self._read_record(path.name) or ()}

    def _key(self, found: ChecksumRange) -> str:
        path = os.path.relpath(found.path, self._conversion.source.path)
        return f"{path}:{found.start}:{found.length}"

    def _publish(self, verify: Callable[[Path], None] | None) -> str:
        """Create the output folder from the complete files; return why not, if another task does.

        The lock only avoids that several tasks do the same work.
        """
        try:
            lock = acquire_lock(self._target.with_name(f".{self._target.name}.lock"))
        except BlockingIOError:
            return "another task publishes the output"
        token = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        publishing = self._target.with_name(f".{self._target.name}.publishing-{token}")
        try:
            for file in self._conversion.output.files:
                (publishing / file.name).parent.mkdir(parents=True, exist_ok=True)
                os.link(self._folder / file.name, publishing / file.name)
            self._conversion.output.finish(publishing, self._sums())
            sync_folder(publishing)
            if verify is not None:
                verify(publishing)
            write_atomically(self._published, json.dumps(self._digest))
            publishing.rename(self._target)
            fsync_path(self._target.parent)
            self._remove_work_folders()
        finally:
            shutil.rmtree(publishing, ignore_errors=True)
            lock.release(remove=True)
        return ""

    def _sums(self) -> Checksums:
        return {
            (file, offset): crc
            for file, name in self._names.items()
            for offset, crc in self._read_record(name)
        }

    def _remove_work_folders(self) -> None:
        """Remove the work folder, and those of tasks that were killed while publishing."""
        removed = self._staging.with_name(f"{self._staging.name}-{secrets.token_hex(4)}")
        self._staging.rename(removed)  # at once: no task may find records without files
        for folder in [removed, *self._target.parent.glob(f".{self._target.name}.publishing-*")]:
            shutil.rmtree(folder, ignore_errors=True)


def _has_size(folder: Path, file: OutputFile) -> bool:
    try:
        return (folder / file.name).stat().st_size == file.size
    except OSError:
        return False


def plan_digest(conversion: Conversion) -> dict[str, str]:
    """Return a digest of everything that decides the bytes of the output files.

    These are the layout of the output files, the locations in the source, size and modification
    time of its files, and the options.
    """
    root = conversion.source.path
    sources = sorted({part.source for copy in conversion.copies for part in copy.read.parts})
    states = {path: Path(path).stat() for path in sources}
    parts = {
        "source files": [
            (os.path.relpath(path, root), state.st_size, state.st_mtime_ns)
            for path, state in states.items()
        ],
        "output files": [
            (file.name, file.size, [(at, zlib.crc32(data)) for at, data in file.fixed])
            for file in conversion.output.files
        ],
        "tensors": [
            (
                copy.name,
                *(str(copy.read.dtype), copy.read.shape),
                [os.path.relpath(part.source, root) for part in copy.read.parts],
                [(slot.file, slot.offset) for slots in copy.write.slots for slot in slots],
            )
            for copy in conversion.copies
        ],
        "options": _plain(vars(conversion.options)),
    }
    return {
        name: hashlib.sha256(json.dumps(value).encode()).hexdigest()
        for name, value in parts.items()
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON, equal in all processes."""
    return {
        name: sorted(map(str, value)) if isinstance(value, frozenset) else str(value)
        for name, value in values.items()
    }
