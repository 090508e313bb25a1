"""Removal of old checkpoints, after the newest one was read back from disk.

Reads a checkpoint back from disk as a resume would, every byte of it.

Removal of checkpoints that are no longer wanted, in a background thread.

An older checkpoint is removed only after the newest one was read back from disk: the one that is
kept must be one that a run can resume from.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import publish, safe_unpickling
from megatron_llmjp.checkpoint.retention import removable_iterations
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import CheckpointConfig
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import no_heartbeat, write_atomically

FORMAT_FILE = "metadata.json"
"""megatron-core's note on the format."""


def verify_checkpoint(folder: Path, is_cancelled: Callable[[], bool] = lambda: False) -> list[str]:
    """What would keep a run from resuming here; empty when nothing would.

    The manifest, the configuration and the index are parsed, sizes and checksums of all files
    compared with the manifest. Only this process reads.

    Args:
        folder: a checkpoint.
        is_cancelled: asked between files; then the answer is that the check was not finished.
    """
    try:
        manifest = manifests.read_manifest(folder)
        load_config(folder / manifests.CONFIG)
        safe_unpickling.read_index(folder)
        json.loads((folder / FORMAT_FILE).read_bytes())
        for name, entry in manifest.files.items():
            if is_cancelled():
                return [f"{folder}: the check was not finished"]
            found = manifests.file_problems(
                folder, manifest.model_copy(update={"files": {name: entry}}), checksums=True
            )
            if found:
                return found
    except (UserError, OSError, ValueError) as error:
        return [str(error)]
    return []


REMOVAL_WAIT_SECONDS = 60.0
"""A run that ends waits so long for the check of its last checkpoint."""


class CheckpointRemover:
    """Thins out a save folder after each save; on the first rank only.

    Args:
        root: the save folder.
        config: which checkpoints to keep.
        fold_ends: iterations that end a fold.
        may_remove: whether training is sound; asked again right before a checkpoint is removed.
        beat: called after each file that was read back or deleted.
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
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()

    def start(self, newest: int) -> None:
        """Thin out for the checkpoint just published, after what is under way; does not wait.

        A check that takes longer than the time between two saves is finished first: meanwhile
        older checkpoints stay.
        """
        with self._lock:
            self._newest = newest
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="remover")
                self._thread.start()

    def wait(self, seconds: float = REMOVAL_WAIT_SECONDS) -> None:
        """Wait for what is under way; after ``seconds``, cancel it and remove nothing more."""
        thread = self._thread
        if thread is None:
            return
        thread.join(seconds)
        if thread.is_alive():
            self._cancelled.set()
            thread.join()
            text = "the newest one was not read back in time; the next save removes them"
            print(f"older checkpoints stay: {text}", flush=True)

    def _run(self) -> None:
        while (newest := self._take()) is not None:
            try:
                self._thin_out(newest)
            except (OSError, UserError) as error:
                text = f"warning: {self._root} could not be thinned out: {error}"
                print(text, file=sys.stderr, flush=True)

    def _thin_out(self, newest: int) -> None:
        if not self._wanted(newest):
            return
        folder = self._root / manifests.folder_name(newest)
        found = verify_checkpoint(folder, self._is_cancelled)
        if self._cancelled.is_set():
            return
        if found:
            self._refuse(newest, found[0])
        else:
            for retired in self._retire(newest):
                # What is left of it, the next save deletes.
                publish.delete_folder(retired, self._beat)

    def _is_cancelled(self) -> bool:
        self._beat()
        return self._cancelled.is_set()

    def _take(self) -> int | None:
        with self._lock:
            newest, self._newest = self._newest, None
            if newest is None or self._cancelled.is_set():
                self._thread = None
                return None
            return newest

    def _wanted(self, newest: int) -> list[int]:
        """Iterations to remove."""
        saved = manifests.complete_iterations(self._root)
        return removable_iterations(saved, newest, self._config, self._fold_ends)

    def _refuse(self, newest: int, problem: str) -> None:
        """Report a checkpoint that cannot be resumed from; the one before is resumed from then."""
        folder = self._root / manifests.folder_name(newest)
        older = [i for i in manifests.complete_iterations(self._root) if i < newest]
        if older and manifests.read_tracker(self._root)[0] == newest:
            write_atomically(self._root / manifests.TRACKER, f"{older[-1]}\n")
        print(
            f"error: {folder} cannot be resumed from: {problem}. No checkpoint is removed, and "
            f"{manifests.TRACKER} names the one before; the next save tries again",
            file=sys.stderr,
            flush=True,
        )

    def _retire(self, newest: int) -> list[Path]:
        """Take their names from checkpoints; where they are until they are deleted."""
        retired = []
        for iteration in self._wanted(newest):
            if not self._may_remove():
                break
            folder = self._root / manifests.folder_name(iteration)
            try:
                retired.append(publish.unpublish_checkpoint(self._root, iteration))
                print(f"removing checkpoint {folder}", flush=True)
            except OSError as error:
                text = f"warning: {folder} could not be removed: {error}"
                print(text, file=sys.stderr, flush=True)
        return retired
