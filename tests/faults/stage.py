"""The runs that faults strike, and what they would be without."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tests.faults.forks import Fault, Start, finish, started
from tests.support.datasets import write_folds
from tests.support.proof import assert_equal_runs, assert_whole
from tests.support.training import DISTRIBUTED, OVERLAP, SP, TP2, arguments

FOLDS = (4, 5, 3)
"""Iterations of each fold."""
FOLD_ENDS = (4, 9, 12)
LAST = sum(FOLDS)

TWO = ("--nproc-per-node", 2)
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "alone": ("--eval-interval", 5),
    "alone-async": ("--eval-interval", 5, "--async-save", "--num-workers", 1),
    "dp2": (*TWO, *DISTRIBUTED, *OVERLAP, "--bf16"),
    "tp2-async": (*TWO, *TP2, *SP, "--async-save"),
}
"""All with dropout."""

TINY = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "global_batch_size": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
}


class Stage:
    """A folder with datasets; runs in it, each layout's undisturbed one among them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folds = write_folds(root, FOLDS)
        self._numbers = itertools.count()
        self._references: dict[str, Path] = {}

    def words(self, layout: str, save: Path, *flags: Any) -> list[str]:
        """A command line. Later flags hold."""
        common = ("--save", save, "--save-interval", 3, *LAYOUTS[layout], *flags)
        return arguments("laptop-gpt2", self.folds, *common, **TINY)

    def folder(self, name: str) -> Path:
        """A new save folder."""
        return self.root / f"{name}-{next(self._numbers)}"

    def run(
        self, layout: str, save: Path, *flags: Any, fault: Fault | None = None
    ) -> tuple[int, str, str]:
        """Start a run and wait for its end: exit code, standard output, standard error."""
        return finish(self.words(layout, save, *flags), self._log(save), fault)

    def started(self, layout: str, save: Path, *flags: Any, fault: Fault | None = None) -> Any:
        """A run under way, in a ``with``."""
        return started(self.words(layout, save, *flags), self._log(save), fault)

    def reference(self, layout: str) -> Path:
        """The save folder of the run that nothing disturbs."""
        if layout not in self._references:
            save = self.root / f"undisturbed-{layout}"
            code, _, errors = self.run(layout, save)
            assert code == 0, errors
            self._references[layout] = save
        return self._references[layout]

    def prove(self, layout: str, save: Path, unfinished: int | None = None) -> None:
        """Losses and final weights equal those of the undisturbed run."""
        assert_whole(save)
        assert_equal_runs(save, self.reference(layout), unfinished)

    def resume_and_prove(
        self, layout: str, save: Path, *flags: Any, unfinished: int | None = None
    ) -> tuple[str, str]:
        """Start again what a fault ended, to its end; standard output and standard error."""
        code, output, errors = self.run(layout, save, *flags)
        assert code == 0, errors
        assert "Traceback" not in errors
        self.prove(layout, save, unfinished)
        return output, errors

    def _log(self, save: Path) -> Path:
        return self.root / "logs" / f"{save.name}-{next(self._numbers)}"


__all__ = ["FOLDS", "FOLD_ENDS", "LAST", "LAYOUTS", "Stage", "Start"]
