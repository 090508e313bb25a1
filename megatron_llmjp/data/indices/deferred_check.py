"""Check of all entries of large datasets' indices, in the background while a run trains.

Reading 20 bytes per document of 113 datasets would delay the first step by minutes. The first rank
of a run does it in a subprocess of low priority; damage ends the run as soon as it is found.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from megatron_llmjp.data.folds.datasets import check_datasets
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.indices.worker import start_job
from megatron_llmjp.errors import EXIT_USER_ERROR, DataError, UserError
from megatron_llmjp.filesystem import warn


class DeferredCheck:
    """Background check of the datasets that were not checked at the start."""

    def __init__(self, datasets: Mapping[str, DatasetInfo], cache: Path) -> None:
        """Check ``datasets``, by path, and record it in ``cache``."""
        self._datasets = {path: info for path, info in datasets.items() if not info.checked}
        self._cache = cache
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the check, if there is anything to check."""
        if self._datasets and self._child is None:
            job = partial(_check, self._datasets, self._cache)
            self._child = start_job(job, stdout=subprocess.PIPE)

    def poll(self) -> None:
        """Return at once; called at every step.

        Raises:
            DataError: the check found a damaged index.
        """
        if self._child is None or (code := self._child.poll()) is None:
            return
        assert self._child.stdout is not None
        found = self._child.stdout.read().decode(errors="replace").strip()
        self.close()
        if code == EXIT_USER_ERROR:
            raise DataError(found)
        if code:
            warn(f"the check of the datasets' indices ended with exit code {code}; see above")

    def close(self) -> None:
        """Stop the check."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                if stream is not None:
                    stream.close()
            self._child = None


def _check(datasets: Mapping[str, DatasetInfo], cache: Path) -> None:
    try:
        check_datasets(datasets, cache)
    except (DataError, UserError) as error:
        print(error, flush=True)
        sys.exit(EXIT_USER_ERROR)
