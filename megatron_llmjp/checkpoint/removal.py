"""Removal of old checkpoints, in a background thread.

Older checkpoints are removed only after the newest one has been read from disk completely and
verified, so that at least one checkpoint can be resumed from.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import publish, safe_unpickling
from megatron_llmjp.checkpoint.retention import removable_iterations
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import CheckpointConfig
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import no_heartbeat, write_atomically

FORMAT_FILE = "metadata.json"
"""File in which megatron-core stores the checkpoint format."""

REMOVAL_WAIT_SECONDS = 60.0
"""Time that a finishing run waits for the verification of its last checkpoint."""


def verify_checkpoint(folder: Path, is_cancelled: Callable[[], bool] = lambda: False) -> list[str]:
    """Return the problems that would prevent a resume from a checkpoint.

    Parses the manifest, the configuration and the index, and compares sizes and checksums of all
    files with the manifest. Not a collective.

    Args:
        folder: the checkpoint.
        is_cancelled: called between files; if true, the result says that the check is incomplete.
    """
    try:
        manifest = manifests.read_manifest(folder)
        load_config(folder / manifests.CONFIG)
        safe_unpickling.read_index(folder)
        json.loads((folder / FORMAT_FILE).read_bytes())
        for name, entry in manifest.files.items():
            if is_cancelled():
                return [f"{folder}: the check was cancelled"]
            found = manifests.file_problems(
                folder, manifest.model_copy(update={"files": {name: entry}}), checksums=True
            )
            if found:
                return found
    except (UserError, OSError, ValueError, RecursionError) as error:
        return [str(error)]
    return []


class CheckpointRemover:
    """Removes old checkpoints after each save; used on rank 0 only.

    Args:
        root: the save folder.
        config: which checkpoints to keep.
        fold_ends: last iterations of folds.
        may_remove: whether removal is allowed (no bad steps); called before each removal.
        beat: called after each file that was verified or deleted.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        fold_ends: Collection[int],
        may_remove: Callable[[], bool],
        beat: Callable[[], None] = no_heartbeat,
    ) -> None:
        self._root, self._config, self._fold_ends = root, config, fold_ends
        self._may_remove, self._beat = may_remove, beat
        self._persistent: dict[int, bool] = {}
        """Whether the checkpoint of an iteration is persistent, from its manifest."""
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()

    def start(self, newest: int) -> None:
        """Start removal after a new checkpoint was published; does not wait.

        If the previous verification is still running, it is finished first; no checkpoint is
        removed until then.
        """
        with self._lock:
            self._newest = newest
            self._persistent.pop(newest, None)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint remover")
                self._thread.start()

    def wait(self, seconds: float = REMOVAL_WAIT_SECONDS) -> None:
        """Wait for the running removal; cancel it after ``seconds``."""
        thread = self._thread
        if thread is None:
            return
        thread.join(seconds)
        if thread.is_alive():
            self._cancelled.set()
            thread.join()
            text = "the newest one was not verified in time; the next save removes them"
            print(f"older checkpoints are kept: {text}", flush=True)

    def _run(self) -> None:
        while (newest := self._next()) is not None:
            try:
                self._remove_old(newest)
            except (OSError, UserError) as error:
                text = f"warning: {self._root}: old checkpoints could not be removed: {error}"
                print(text, file=sys.stderr, flush=True)

    def _remove_old(self, newest: int) -> None:
        if not self._removable(newest):
            return
        folder = self._root / manifests.folder_name(newest)
        found = verify_checkpoint(folder, self._is_cancelled)
        if self._cancelled.is_set():
            return
        if found:
            self._report_unusable(newest, found[0])
        else:
            for unpublished in self._unpublish_old(newest):
                # The next save deletes leftovers.
                publish.delete_folder(unpublished, self._beat)

    def _is_cancelled(self) -> bool:
        self._beat()
        return self._cancelled.is_set()

    def _next(self) -> int | None:
        with self._lock:
            newest, self._newest = self._newest, None
            if newest is None or self._cancelled.is_set():
                self._thread = None
                return None
            return newest

    def _removable(self, newest: int) -> list[int]:
        """Return the iterations to remove."""
        saved = manifests.complete_iterations(self._root)
        non_persistent = self._non_persistent(i for i in saved if i <= newest)
        return removable_iterations(saved, newest, self._config, self._fold_ends, non_persistent)

    def _non_persistent(self, iterations: Iterable[int]) -> set[int]:
        """Return the iterations of non-persistent checkpoints, reading each manifest once."""
        found = set()
        for iteration in iterations:
            if iteration not in self._persistent:
                try:
                    folder = self._root / manifests.folder_name(iteration)
                    self._persistent[iteration] = manifests.read_manifest(folder).persistent
                except UserError:  # damaged, or removed by someone else
                    continue
                self._beat()
            if not self._persistent[iteration]:
                found.add(iteration)
        return found

    def _report_unusable(self, newest: int, problem: str) -> None:
        """Report a checkpoint that cannot be resumed, and set the tracker to the previous one."""
        folder = self._root / manifests.folder_name(newest)
        older = [i for i in manifests.complete_iterations(self._root) if i < newest]
        if older and manifests.read_tracker(self._root)[0] == newest:
            write_atomically(self._root / manifests.TRACKER, f"{older[-1]}\n")
        print(
            f"error: cannot resume from {folder}: {problem}. No checkpoint is removed, and "
            f"{manifests.TRACKER} is set to the previous one; the next save tries again",
            file=sys.stderr,
            flush=True,
        )

    def _unpublish_old(self, newest: int) -> list[Path]:
        """Rename old checkpoints to temporary names and return these."""
        unpublished = []
        for iteration in self._removable(newest):
            if not self._may_remove():
                break
            folder = self._root / manifests.folder_name(iteration)
            try:
                unpublished.append(publish.unpublish_checkpoint(self._root, iteration))
                print(f"removing checkpoint {folder}", flush=True)
            except OSError as error:
                text = f"warning: {folder} could not be removed: {error}"
                print(text, file=sys.stderr, flush=True)
        return unpublished
