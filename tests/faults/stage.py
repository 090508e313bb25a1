"""Runs that faults are injected into, and reference runs without faults."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tests.faults.start import Fault, Start, finish, started
from tests.support.datasets import write_folds
from tests.support.proof import assert_checkpoints_complete, assert_equal_runs
from tests.support.training import DISTRIBUTED, OVERLAP, SP, TP2, arguments

FOLDS = (4, 5, 3)
"""Number of iterations of each fold."""
FOLD_ENDS = (4, 9, 12)
LAST = sum(FOLDS)

TWO = ("--nproc-per-node", 2)
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "alone": ("--eval-interval", 5),
    "alone-async": ("--eval-interval", 5, "--async-save", "--num-workers", 1),
    "dp2": (*TWO, *DISTRIBUTED, *OVERLAP, "--bf16"),
    "tp2-async": (*TWO, *TP2, *SP, "--async-save"),
    "cp2": (*TWO, "--context-parallel-size", 2, *DISTRIBUTED),
}
"""Flags of each layout; all use dropout."""

TINY = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "global_batch_size": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
}


class Stage:
    """Folder with datasets, in which runs and the reference run of each layout are started."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folds = write_folds(root, FOLDS)
        self._numbers = itertools.count()
        self._references: dict[str, Path] = {}

    def words(self, layout: str, save: Path, *flags: Any) -> list[str]:
        """Return a command line; of repeated flags the last one is used."""
        common = ("--save", save, "--save-interval", 3, *LAYOUTS[layout], *flags)
        return arguments("laptop-gpt2", self.folds, *common, **TINY)

    def folder(self, name: str) -> Path:
        """Return a new save folder."""
        return self.root / f"{name}-{next(self._numbers)}"

    def run(
        self, layout: str, save: Path, *flags: Any, fault: Fault | None = None
    ) -> tuple[int, str, str]:
        """Run to the end; return exit code, standard output and standard error."""
        return finish(self.words(layout, save, *flags), fault)

    def started(self, layout: str, save: Path, *flags: Any, fault: Fault | None = None) -> Any:
        """Return a context manager of a running program."""
        return started(self.words(layout, save, *flags), fault)

    def reference(self, layout: str) -> Path:
        """Return the save folder of the layout's run without faults."""
        if layout not in self._references:
            save = self.root / f"reference-{layout}"
            code, _, errors = self.run(layout, save)
            assert code == 0, errors
            self._references[layout] = save
        return self._references[layout]

    def prove(self, layout: str, save: Path, unfinished: int | None = None) -> None:
        """Assert that losses and final weights equal those of the reference run."""
        assert_checkpoints_complete(save)
        assert_equal_runs(save, self.reference(layout), unfinished)

    def resume_and_prove(
        self, layout: str, save: Path, *flags: Any, unfinished: int | None = None
    ) -> tuple[str, str]:
        """Resume a run to its end, compare it, and return standard output and standard error."""
        code, output, errors = self.run(layout, save, *flags)
        assert code == 0, errors
        assert "Traceback" not in errors
        self.prove(layout, save, unfinished)
        return output, errors


__all__ = ["FOLDS", "FOLD_ENDS", "LAST", "LAYOUTS", "Stage", "Start"]
