"""Runs as recorded in their save folders."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from data_tools.lineage.occurrences import dataset_path, document_occurrences
from data_tools.run_history import RecordedRun, open_lineage
from data_tools.run_history import open_run as _open_run
from megatron_llmjp.api.errors import OutOfRangeError, raises_user_errors
from megatron_llmjp.api.metrics import Metrics, read_metrics
from megatron_llmjp.api.schedules import FoldSchedule, Sample
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer


class Run:
    """A run, as its newest complete checkpoint records it.

    Attributes:
        folder: the save folder.
        checkpoint: the checkpoint that was read.
        iteration: iteration of this checkpoint.
        config: the resolved configuration.
        tokenizer: the run's tokenizer; None if it has none.
        schedule: the folds, with the skipped samples of the run.

    Example:
        >>> run = ml.open_run("checkpoints")
        >>> run.iteration, run.config.model.num_layers, run.checkpoints
        (10, 2, [5, 6, 10])
    """

    def __init__(self, folder: Path, recorded: RecordedRun) -> None:
        self.folder, self.checkpoint = folder, recorded.folder
        self.iteration: int = recorded.manifest.iteration
        self.config: Config = recorded.config
        self.tokenizer: Tokenizer | None = recorded.tokenizer
        self.schedule = FoldSchedule(recorded.schedule, lambda: open_lineage(recorded, None))
        self._recorded = recorded

    def __repr__(self) -> str:
        return f"Run('{self.folder}', iteration={self.iteration:,})"

    @property
    def checkpoints(self) -> list[int]:
        """Iterations of the complete checkpoints."""
        return manifests.complete_iterations(self.folder)

    @raises_user_errors
    def metrics(self) -> Metrics:
        """Return the metrics of the run so far.

        Raises:
            UserError: the folder has none.

        Example:
            >>> len(ml.open_run("checkpoints").metrics().training)
            10
        """
        return read_metrics(self.folder)

    @raises_user_errors
    def batch(self, iteration: int) -> list[Sample]:
        """Return the samples of the global batch of an iteration, past or future.

        Raises:
            OutOfRangeError: the run has no such iteration.

        Example:
            >>> batch = ml.open_run("checkpoints").batch(7)
            >>> [sample.number for sample in batch], batch[0].fold
            ([24, 25, 26, 27], 'japanese')
        """
        try:
            numbers = self._recorded.samples_of(iteration)
        except UserError as error:
            raise OutOfRangeError(str(error).removeprefix("--")) from None
        return [self.schedule.sample(number) for number in numbers]

    @raises_user_errors
    def iterations_of_document(self, dataset: str, document: int) -> list[int]:
        """Return the iterations that train on a document, past and future, in order.

        Args:
            dataset: name of the dataset in a fold, or its path.
            document: number of the document, from 0.

        Raises:
            UserError: the run has no such dataset or document.

        Example:
            >>> run = ml.open_run("checkpoints")
            >>> part = run.batch(3)[0].documents[0]
            >>> 3 in run.iterations_of_document(part.dataset, part.document)
            True
        """
        path = dataset_path(self._recorded, dataset)
        found = document_occurrences(self._recorded, self.schedule.lineage(), path, document)
        numbers = {entry["iteration"] for entry in found}
        return sorted(number for number in numbers if number is not None)


@raises_user_errors
def open_run(folder: str | PathLike[str], *, fold_file: str | PathLike[str] | None = None) -> Run:
    """Open a run by its save folder.

    Args:
        folder: the ``--save`` folder, or one checkpoint in it.
        fold_file: a fold file with the current paths of the datasets, if they have moved.

    Raises:
        UserError: no checkpoint is complete, or the data differs from the data that it was
            trained on.

    Example:
        >>> ml.open_run("checkpoints")
        Run('checkpoints', iteration=10)
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the --save folder of a run")
    file = None if fold_file is None else Path(fold_file)
    recorded = _open_run(root, lambda manifest: False, file)
    return Run(recorded.folder.parent if root == recorded.folder else root, recorded)
