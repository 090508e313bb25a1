"""Conversion of each new checkpoint of a run (``--follow``), and a command for each.

Checkpoints are converted oldest first, one at a time, into ``OUTPUT/iter_0001000``. Conversions do
not wait for the command, which runs for one checkpoint at a time: an evaluation may take longer
than the run keeps its checkpoints.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.run_lock import RECORD
from megatron_llmjp.checkpoint.save_folder import find_foreign_checkpoint, recognize
from megatron_llmjp.convert.follow.command import RunningCommand, defer_interrupts
from megatron_llmjp.convert.follow.held_checkpoint import hold_checkpoint
from megatron_llmjp.convert.follow.journal import CheckpointId, Journal
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, UserError
from megatron_llmjp.filesystem import FileLock, acquire_lock
from megatron_llmjp.report.metrics_tail import read_recent_metrics

LOCK = ".follow.lock"

Convert = Callable[[Path, Path], None]
"""Converts a checkpoint (first argument) to a folder (second); raises UserError."""


@dataclass(frozen=True)
class FollowSettings:
    """What to follow, and what to do with each checkpoint."""

    save: Path
    output: Path
    target: str
    """Format of the outputs."""
    command: str | None = None
    poll_seconds: float = 60.0
    stop_on_error: bool = False
    """End at the first checkpoint whose conversion or command fails."""


def follow(settings: FollowSettings, convert: Convert) -> int:
    """Convert the checkpoints of a run until it is finished, and return the exit code.

    Returns:
        0, 1 if a conversion or a command failed, 130 after Ctrl-C or SIGTERM.

    Raises:
        UserError: the save folder is not one of a run, or the output folder is in use or belongs to
            another run.
    """
    check_save_folder(settings.save)
    if settings.output.resolve() == settings.save.resolve():
        raise UserError(f"--output {settings.output}: is the followed folder; give another one")
    lock = _lock(settings.output)
    try:
        journal = Journal(settings.output, settings.save, settings.target)
        return _Follower(settings, journal, convert).run()
    except OSError as error:
        raise UserError(f"{error.filename or settings.output}: {error.strerror}") from error
    finally:
        lock.release(remove=True)


def _lock(output: Path) -> FileLock:
    try:
        output.mkdir(parents=True, exist_ok=True)
        return acquire_lock(output / LOCK)
    except BlockingIOError:
        raise UserError(
            f"--output {output}: is in use by another convert_checkpoint --follow"
        ) from None
    except OSError as error:
        raise UserError(f"--output {output}: cannot be created: {error.strerror}") from error


def check_save_folder(save: Path) -> None:
    """Check that a folder can be followed.

    Raises:
        UserError: it does not exist, is a checkpoint itself, or belongs to another program.
    """
    if not save.is_dir():
        raise UserError(f"--follow {save}: does not exist; expected the folder of a run (--save)")
    found = recognize(save) or find_foreign_checkpoint(save)
    if found is not None:
        raise UserError(
            f"--follow {save}: {found.folder} is {found.title}; expected the save folder of a run "
            "of this program"
        )


def run_is_finished(save: Path) -> bool:
    """Return whether the last process of a run did all iterations and released the save folder.

    A run that was stopped, failed or killed may be resumed, and is not finished.
    """
    if (save / RECORD).exists():
        return False
    end = read_recent_metrics(save).end
    return end is not None and end.get("outcome") == "done"


class _Follower:
    def __init__(self, settings: FollowSettings, journal: Journal, convert: Convert) -> None:
        self._settings, self._journal, self._convert = settings, journal, convert
        self._tried: set[CheckpointId] = set()
        """Checkpoints that were converted, or could not be, in this process."""
        self._commanded: set[CheckpointId] = set()
        """Checkpoints for which the command was started in this process."""
        self._running: RunningCommand | None = None
        self._failures = 0

    def run(self) -> int:
        """Follow the run to its end."""
        _say(f"following {self._settings.save}; stop with Ctrl-C, and continue the same way")
        try:
            while not self._must_stop():
                # Before the checkpoints are listed: the last one is saved before the end.
                is_finished = run_is_finished(self._settings.save)
                self._convert_new()
                self._start_command()
                if is_finished and self._running is None:
                    break
                self._wait()
        except KeyboardInterrupt:
            _say("stopped; the same command continues")
            return EXIT_INTERRUPTED
        finally:
            if self._running is not None:
                self._running.stop()
        if self._failures:
            _say(f"{self._failures} conversions or commands failed; the same command repeats them")
            return EXIT_FAILURE
        return EXIT_DONE

    def _must_stop(self) -> bool:
        return self._settings.stop_on_error and self._failures > 0

    def _output(self, checkpoint: CheckpointId) -> Path:
        return self._settings.output / manifests.folder_name(checkpoint.iteration)

    def _convert_new(self) -> None:
        """Convert all checkpoints that were not converted yet, oldest first."""
        for iteration in manifests.complete_iterations(self._settings.save):
            checkpoint = _identify(self._settings.save, iteration)
            if checkpoint is None or checkpoint in self._tried or self._must_stop():
                continue
            self._tried.add(checkpoint)
            if not self._is_done(checkpoint):
                self._convert_one(checkpoint)
            self._poll_command(0.0)
            self._start_command()

    def _is_done(self, checkpoint: CheckpointId) -> bool:
        """Return whether a checkpoint need not be converted (again).

        An output that was removed is not needed again, unless its command has not succeeded.
        """
        if self._journal.is_converted(checkpoint):
            if self._output(checkpoint).exists() or self._settings.command is None:
                return True
            return self._journal.is_commanded(checkpoint)
        if self._journal.has_begun(checkpoint) and self._output(checkpoint).exists():
            self._journal.convert(checkpoint, 0.0)  # the process was killed just after
            return True
        return False

    def _convert_one(self, checkpoint: CheckpointId) -> None:
        folder = self._settings.save / manifests.folder_name(checkpoint.iteration)
        output = self._output(checkpoint)
        begin = time.monotonic()
        try:
            if self._journal.was_written(checkpoint.iteration) and output.exists():
                _say(f"{folder} was saved again: {output} is replaced")
                self._stop_command_of(checkpoint.iteration)
                shutil.rmtree(output)
            with hold_checkpoint(folder, self._settings.output) as held:
                if not output.exists():
                    self._journal.begin(checkpoint)
                self._convert(held, output)
        except (UserError, FileNotFoundError) as error:
            if _identify(self._settings.save, checkpoint.iteration) != checkpoint:
                _say(f"{folder} was removed before it was converted")
                return
            self._fail(f"{folder}: the conversion failed: {error}")
            return
        self._journal.convert(checkpoint, time.monotonic() - begin)

    def _stop_command_of(self, iteration: int) -> None:
        """Stop the command if it reads the output of an iteration that is replaced."""
        if self._running is not None and self._running.checkpoint.iteration == iteration:
            self._running.stop()
            self._running = None

    def _start_command(self) -> None:
        """Start the command for the oldest checkpoint that needs it, if none is running."""
        if self._settings.command is None or self._running is not None or self._must_stop():
            return
        for checkpoint in self._journal.converted():
            is_done = checkpoint in self._commanded or self._journal.is_commanded(checkpoint)
            if is_done or not self._output(checkpoint).is_dir():
                continue
            self._commanded.add(checkpoint)
            _say(f"{self._output(checkpoint)}: running the command")
            with defer_interrupts():  # a command that is not in _running would not be stopped
                self._running = RunningCommand(
                    self._settings.command, checkpoint, self._output(checkpoint)
                )
            return

    def _poll_command(self, timeout: float) -> None:
        """Wait for the running command for some seconds, and record its end."""
        running = self._running
        if running is None:
            return
        code = running.wait(timeout)
        if code is None:
            return
        self._running = None
        self._journal.command(running.checkpoint, code, running.seconds)
        if code != 0:
            self._fail(f"{self._output(running.checkpoint)}: the command failed: exit code {code}")
            return
        _say(f"{self._output(running.checkpoint)}: the command took {running.seconds:.0f} s")

    def _wait(self) -> None:
        """Wait until the save folder is read again, or until the command ends."""
        if self._running is not None:
            self._poll_command(self._settings.poll_seconds)
        else:
            time.sleep(self._settings.poll_seconds)

    def _fail(self, text: str) -> None:
        self._failures += 1
        print(f"convert_checkpoint: {text}", file=sys.stderr, flush=True)


def _identify(save: Path, iteration: int) -> CheckpointId | None:
    """Return the identity of a checkpoint, or None if it was removed."""
    try:
        content = (save / manifests.folder_name(iteration) / manifests.MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return CheckpointId(iteration, hashlib.sha256(content).hexdigest())


def _say(text: str) -> None:
    print(text, flush=True)
