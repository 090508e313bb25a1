"""Metrics of a run: log intervals, validations and events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llmjp.api.errors import NotInstalledError, raises_user_errors
from megatron_llmjp.metric_registry import ITERATION
from megatron_llmjp.report.history import read_history

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]
"""Values by name, as in ``metrics.jsonl``; every record has ``iteration``."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run, without intervals that were repeated after a restart.

    Attributes:
        training: one record per log interval, by iteration.
        validation: one record per validation.
        events: starts, folds, ends and exceptional events.
    """

    training: tuple[Record, ...]
    validation: tuple[Record, ...]
    events: tuple[Record, ...]

    def __repr__(self) -> str:
        counts = {name: len(records) for name, records in vars(self).items()}
        return f"Metrics({', '.join(f'{name}={number}' for name, number in counts.items())})"

    @raises_user_errors
    def to_pandas(self, kind: str = "training") -> pd.DataFrame:
        """Return ``training``, ``validation`` or ``events`` as a table with index ``iteration``.

        Raises:
            NotInstalledError: pandas is not installed.

        Example:
            >>> table = ml.read_metrics("checkpoints").to_pandas()
            >>> table.index.name, len(table)
            ('iteration', 10)
            >>> bool(table["lm loss"].iloc[-1] < table["lm loss"].iloc[0])
            True
        """
        records: Sequence[Record] = getattr(self, kind, ())
        if kind not in vars(self):
            raise NotInstalledError(f"{kind}: expected one of {', '.join(vars(self))}")
        try:
            import pandas as pd
        except ImportError:
            raise NotInstalledError(
                "to_pandas requires pandas: pip install 'megatron_llmjp[pandas]'; the records "
                "themselves are in .training, .validation and .events"
            ) from None
        if not records:
            return pd.DataFrame(index=pd.Index([], name=ITERATION))
        return pd.DataFrame.from_records(list(records)).set_index(ITERATION)


@raises_user_errors
def read_metrics(folder: str | PathLike[str]) -> Metrics:
    """Read the metrics of a run, which may be running.

    Args:
        folder: the run's ``--save`` folder.

    Raises:
        UserError: the folder has no metrics.

    Example:
        >>> metrics = ml.read_metrics("checkpoints")
        >>> metrics
        Metrics(training=10, validation=1, events=4)
        >>> last = metrics.training[-1]
        >>> last["iteration"], last["consumed samples"], last["fold"]
        (10, 40, 'japanese')
    """
    history = read_history(Path(folder))
    return Metrics(tuple(history.training), tuple(history.validation), tuple(history.events))
