"""What the files of a run record about a checkpoint, for its model card.

Everything is read from the checkpoint's folder and from ``metrics.jsonl`` of its save folder, up to
the checkpoint's iteration. Nothing is derived from names or defaults; what is not recorded is None.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.folds.schedule import Schedule, SkippedSamples, apportion
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.metric_registry import (
    EVENT,
    HARDWARE,
    ITERATION,
    LM_LOSS,
    METRICS_FILE,
)
from megatron_llmjp.report.history import MetricsHistory, read_history

_TRAINER = "megatron_llmjp"
"""Entry of a manifest's versions that only a training run writes."""


@dataclass(frozen=True)
class DatasetTokens:
    """Tokens that a run consumed of one dataset.

    Attributes:
        name: name in the fold file.
        folds: names of the folds, in training order.
        tokens: number of tokens.
        is_exact: false if a fold was consumed in part, or samples were skipped: the dataset is then
            counted by its share of the fold.
    """

    name: str
    folds: tuple[str, ...]
    tokens: int
    is_exact: bool


@dataclass(frozen=True)
class RunRecord:
    """A run as recorded up to a checkpoint; None and empty values are not recorded.

    Attributes:
        config: configuration of the run.
        manifest: manifest of the checkpoint.
        datasets: tokens by dataset, most tokens first.
        hardware: devices that the run used, in order.
        loss: mean training loss of the last log interval.
        validation: last loss of each validation set.
        folds_with_rates: names of folds with a learning-rate schedule of their own.
        curve: loss curve as a PNG file.
    """

    config: Config
    manifest: Manifest
    datasets: tuple[DatasetTokens, ...] = ()
    hardware: tuple[str, ...] = ()
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    folds_with_rates: tuple[str, ...] = ()
    curve: bytes | None = None

    @property
    def tokens(self) -> int:
        """Consumed tokens."""
        return self.manifest.consumed_samples * self.config.data.seq_length


def read_run_record(checkpoint: Path) -> RunRecord | None:
    """Read the record of a native checkpoint; None if a conversion wrote it.

    Args:
        checkpoint: the checkpoint's folder, in the save folder of its run.

    Raises:
        UserError: a file of the checkpoint is damaged.
    """
    manifest = manifests.read_manifest(checkpoint)
    if _TRAINER not in manifest.versions or not manifest.consumed_samples:
        return None
    config = load_config(checkpoint / manifests.CONFIG)
    record = RunRecord(
        config,
        manifest,
        tuple(_dataset_tokens(manifest)),
        folds_with_rates=tuple(_folds_with_rates(checkpoint, manifest)),
    )
    if not (checkpoint.parent / METRICS_FILE).is_file():
        return record
    history = _until(manifest.iteration, read_history(checkpoint.parent))
    history.config = config
    starts = [
        e for e in history.events if e[EVENT] == "start" and e[ITERATION] < manifest.iteration
    ]
    return replace(
        record,
        hardware=tuple(dict.fromkeys(str(e[HARDWARE]) for e in starts if e.get(HARDWARE))),
        loss=history.last(LM_LOSS.name),
        validation={k: values[-1] for k, (_, values) in history.validation_sets().items()},
        curve=_draw(history) if history.training else None,
    )


def _dataset_tokens(manifest: Manifest) -> Iterator[DatasetTokens]:
    """Yield the consumed tokens of each dataset, most tokens first.

    A dataset is counted as :meth:`Schedule.consumed_by_dataset` counts it.
    """
    skips = SkippedSamples.of(manifest.skips)
    end = Schedule(0, 0, (), skips).consumed_end(manifest.consumed_samples)
    found: dict[tuple[str, str], DatasetTokens] = {}
    for name, fold in manifest.folds.items():
        if not fold.datasets or fold.sequence_length is None:
            return  # written by a version that did not record them
        last = min(end, fold.first_sample + fold.samples)
        trained = skips.kept(fold.first_sample, last)
        amounts = [float(dataset.samples) for dataset in fold.datasets.values()]
        is_exact = trained == fold.samples and fold.order == "folds"
        for (label, dataset), samples in zip(
            fold.datasets.items(), apportion(trained, amounts), strict=True
        ):
            key = (label, dataset.key)
            before = found.get(key, DatasetTokens(label, (), 0, True))
            found[key] = DatasetTokens(
                label,
                (*before.folds, name),
                before.tokens + samples * fold.sequence_length,
                before.is_exact and is_exact,
            )
    yield from sorted(found.values(), key=lambda dataset: -dataset.tokens)


def _folds_with_rates(checkpoint: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the consumed folds whose learning rate does not follow the run's schedule."""
    path = checkpoint / manifests.FOLDS
    if path.is_file():
        file = FoldFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        rates = {fold.name for fold in file.folds if fold.learning_rate is not None}
        yield from (name for name in manifest.folds if name in rates)


def _until(iteration: int, history: MetricsHistory) -> MetricsHistory:
    """Return a history without the records after an iteration.

    An event ``start`` or ``fold`` with this iteration belongs to the following ones.
    """
    kept = MetricsHistory(history.folder)
    kept.training = [r for r in history.training if int(r[ITERATION]) <= iteration]
    kept.validation = [r for r in history.validation if int(r[ITERATION]) <= iteration]
    kept.events = [e for e in history.events if int(e[ITERATION]) < iteration]
    kept.restarts = [i for i in history.restarts if i < iteration]
    return kept


def _draw(history: MetricsHistory) -> bytes:
    """Return the loss curve as PNG."""
    from megatron_llmjp.report.plots import draw_all  # imported late: matplotlib takes a second

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        _, _, figure = next(draw_all(history))
        figure.savefig(stream, dpi=130, format="png", metadata={"Software": None})
    return stream.getvalue()
