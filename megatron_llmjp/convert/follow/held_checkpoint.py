"""Hard links to the files of a checkpoint, so that the run may remove it meanwhile.

The run's retention removes names of files; their contents exist as long as another name does. The
links need the file system of the save folder; on another one the checkpoint itself is read, and may
disappear.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.metric_registry import METRICS_FILE

FOLDER = ".source"


@contextmanager
def hold_checkpoint(checkpoint: Path, output: Path) -> Iterator[Path]:
    """Yield a folder with links to all files of a checkpoint, or the checkpoint itself.

    The links are in ``output/.source``; they are removed at the end.

    Raises:
        FileNotFoundError: the checkpoint was removed.
    """
    root = output / FOLDER
    shutil.rmtree(root, ignore_errors=True)  # of a killed process
    try:
        yield _link(checkpoint, root) or checkpoint
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _link(checkpoint: Path, root: Path) -> Path | None:
    """Return the folder with the links; None if the file system does not support them."""
    folder = root / checkpoint.name
    names = [*manifests.all_files(checkpoint), manifests.MANIFEST]
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(checkpoint / name, folder / name)
        metrics = checkpoint.parent / METRICS_FILE
        if metrics.is_file():  # the history of the run, next to its checkpoints
            (root / METRICS_FILE).symlink_to(metrics.absolute())
    except FileNotFoundError:
        raise
    except OSError:
        return None
    return folder
