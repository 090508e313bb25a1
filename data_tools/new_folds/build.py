"""Conversion of requested datasets and a budget to a fold file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from data_tools.new_folds.requests import DataRequest, RequestedDataset, name_datasets
from data_tools.new_folds.shell_lists import DatasetLists
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule, planned_samples
from megatron_llmjp.data.folds.data_path import fold_file_from_flags, given_data_flags
from megatron_llmjp.data.folds.parts import divide_fold
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.folds.schedule import DatasetInfo, FoldPlan
from megatron_llmjp.data.folds.schema import BlendEntry, Fold, FoldFile, ValidationSet
from megatron_llmjp.data.folds.splits import split_shares
from megatron_llmjp.errors import UserError

_EPOCH_DIGITS = 9
"""Significant digits of epochs: no sample of a dataset with fewer samples is lost."""


_MAX_OMITTED = 0.01


@dataclass(frozen=True)
class Budget:
    """Length of the run, from the flags that limit it."""

    unit: str
    """``iterations``, ``samples`` or ``tokens``."""
    value: int
    flag: str


def find_budget(config: Config) -> Budget | None:
    """Return the budget that the run's limits give, or None without a limit.

    Raises:
        UserError: two limits are given.
    """
    training = config.training
    possible = (
        ("iterations", training.train_iters, "--train-iters"),
        ("samples", training.train_samples, "--train-samples"),
        ("tokens", training.train_tokens, "--train-tokens"),
    )
    found = [Budget(unit, value, flag) for unit, value, flag in possible if value is not None]
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(budget.flag for budget in found)} both give the budget: keep one"
        )
    return found[0] if found else None


def inventory(request: DataRequest) -> FoldFile:
    """Return a fold file that names all datasets of a request, to inspect them."""
    names = name_datasets([entry.path for entry in request.datasets])
    blend = {
        name: BlendEntry(path=entry.path)
        for name, entry in zip(names, request.datasets, strict=True)
    }
    fold = Fold(name="train", epochs=1, blend=blend)
    held_out = (*request.validation, *request.held_out)
    return FoldFile(folds=(fold,), validation=_validation(held_out))


def _validation(paths: Sequence[str]) -> dict[str, ValidationSet]:
    paths = list(dict.fromkeys(paths))
    names = name_datasets(paths)
    return {name: ValidationSet(path=path) for name, path in zip(names, paths, strict=True)}


def make_fold_file(
    request: DataRequest, infos: Mapping[str, DatasetInfo], config: Config, parts: int
) -> tuple[FoldFile, list[str]]:
    """Return a fold file and warnings: one fold, or ``parts`` disjoint ones of the same mixture.

    Args:
        request: the datasets; each path once.
        infos: their sizes, by path.
        config: sequence length, batch sizes, seed and budget.
        parts: number of folds.

    Raises:
        UserError: the budget does not suit the amounts, or cannot be divided into the folds.
    """
    budget, length = find_budget(config), config.data.seq_length
    fold = _single_fold(request, infos, budget, length)
    seed = config.training.seed
    validation = _validation((*request.validation, *request.held_out))
    plan = _plan(fold, infos, config)
    if parts == 1:
        fold = _with_needed_repeats(fold, plan)
        return FoldFile(seed=seed, folds=(fold,), validation=validation), []
    if budget is not None:
        _check_divisible(budget, plan.samples, parts, length)
    folds = divide_fold(plan, parts, length, exact=budget is not None)
    file = FoldFile(seed=seed, sequence_length=length, folds=folds, validation=validation)
    return file, [] if budget else list(_omitted(plan, parts))


def _omitted(plan: FoldPlan, parts: int) -> Iterator[str]:
    """Warn of datasets of which equal folds omit more than 1 % of the samples."""
    for piece in plan.slices:
        rest = piece.samples % parts
        if rest > _MAX_OMITTED * piece.samples:
            yield (
                f"{piece.path}: {rest:,} of its {piece.samples:,} samples are not used, because "
                f"{parts} folds cannot share them equally"
            )


def _single_fold(
    request: DataRequest,
    infos: Mapping[str, DatasetInfo],
    budget: Budget | None,
    length: int,
) -> Fold:
    """Return one fold with the requested amounts, in which all datasets may be repeated."""
    names = name_datasets([entry.path for entry in request.datasets])
    blend = {
        name: _entry(entry, infos[entry.path], request, budget, length)
        for name, entry in zip(names, request.datasets, strict=True)
    }
    if request.kind is None and budget is None:
        return Fold(name="train", epochs=1, blend=blend)
    size = {budget.unit: budget.value} if budget else {}
    if "tokens" in size:  # whole samples, as many as the run needs to reach --train-tokens
        size["tokens"] = ceil(size["tokens"] / length) * length
    return Fold.model_validate({"name": "train", **size, "blend": blend})


def _entry(
    entry: RequestedDataset,
    info: DatasetInfo,
    request: DataRequest,
    budget: Budget | None,
    length: int,
) -> BlendEntry:
    kind, amount = request.kind, entry.amount
    if kind is None or amount is None:  # datasets in proportion to their sizes
        weight = float(max(info.tokens, 1)) if budget else None
        return BlendEntry(path=entry.path, weight=weight, repeat=budget is not None)
    if kind == "weight" and budget is None:
        return _epochs_entry(entry.path, _repeat_of(entry.path, amount, info, request))
    if kind == "epochs":
        if budget is None:
            return _epochs_entry(entry.path, amount)
        return BlendEntry(path=entry.path, weight=amount * max(info.tokens, 1), repeat=True)
    if kind == "weight":
        return BlendEntry(path=entry.path, weight=amount, repeat=True)
    # All tokens of a dataset are one epoch, which omits those that do not fill a sample.
    one_epoch = info.samples_per_epoch(length) * length
    tokens = one_epoch if one_epoch < amount <= info.tokens else int(amount)
    return BlendEntry(path=entry.path, tokens=max(tokens, 1), repeat=True)


def _repeat_of(path: str, weight: float, info: DatasetInfo, request: DataRequest) -> float:
    """Return the epochs of a weight that is tokens x repeat."""
    if not request.weights_are_tokens or weight < 1:
        raise UserError(
            f"the weight of {path} is {weight:g}: weights require a budget, --train-iters, "
            "--train-samples or --train-tokens"
            + (
                ", unless they are numbers of tokens (tokens x repeat)"
                if request.weights_are_tokens
                else "; give tokens or epochs instead to do without"
            )
        )
    return weight / max(info.tokens, 1)


def _epochs_entry(path: str, epochs: float) -> BlendEntry:
    """Return an entry of ``epochs``; nearly whole numbers become whole."""
    whole = round(epochs)
    rounded = float(f"{epochs:.{_EPOCH_DIGITS}g}")
    return BlendEntry(
        path=path, epochs=whole if whole and abs(epochs / whole - 1) < 1e-6 else rounded
    )


def _plan(fold: Fold, infos: Mapping[str, DatasetInfo], config: Config) -> FoldPlan:
    sizes = BatchSizeSchedule(config)
    file = FoldFile(seed=config.training.seed, folds=(fold,))
    return resolve_folds(file, infos, config.data.seq_length, sizes).folds[0]


def _with_needed_repeats(fold: Fold, plan: FoldPlan) -> Fold:
    """Return the fold with ``repeat`` only where a dataset has more than one epoch."""
    often = {piece.name: piece.end > piece.samples_per_epoch for piece in plan.slices}
    blend = {
        name: entry.model_copy(update={"repeat": often[name] and entry.epochs is None})
        for name, entry in fold.blend.items()
    }
    return fold.model_copy(update={"blend": blend})


def _check_divisible(budget: Budget, samples: int, parts: int, length: int) -> None:
    if samples % parts == 0:
        return
    step = parts * length if budget.unit == "tokens" else parts
    below, above = budget.value // step * step, -(-budget.value // step) * step
    raise UserError(
        f"{budget.flag} {budget.value:,} is {samples:,} samples, which {parts} folds cannot share "
        f"equally: give {f'{below:,} or ' if below else ''}{above:,}"
    )


def make_megatron_file(
    request: DataRequest, infos: Mapping[str, DatasetInfo], config: Config
) -> FoldFile:
    """Return a fold file whose only fold is in Megatron-LM's order.

    The samples are those of Megatron-LM with the same lists, ``--split``, seed and length.

    Args:
        request: the datasets; a path may occur several times.
        infos: sizes by path, to convert amounts in epochs to weights.
        config: the run's configuration.

    Raises:
        UserError: as :func:`fold_file_from_flags`.
    """
    samples = planned_samples(config, BatchSizeSchedule(config))
    data = config.data
    if given_data_flags(data) in ([], ["--split"]):
        lists = request.lists or DatasetLists(train=_words(request, infos))
        if lists.valid or lists.test:
            parts = {"train": lists.train, "valid": lists.valid, "test": lists.test}
            update: dict[str, Any] = {f"{part}_data_path": w for part, w in parts.items()}
        else:
            update = {"data_path": lists.train, "split": data.split or lists.split}
        data = data.model_copy(update=update)
    file = fold_file_from_flags(data, samples, config.training.seed)
    return file.model_copy(update={"validation": file.validation | _validation(request.held_out)})


def _words(request: DataRequest, infos: Mapping[str, DatasetInfo]) -> tuple[str, ...]:
    """Return the list of datasets as for ``--data-path``, with the amounts as weights."""
    words: list[str] = []
    for entry in request.datasets:
        amount = entry.amount
        if amount is not None and request.kind == "epochs":
            amount *= max(infos[entry.path].tokens, 1)
        words += [entry.path] if amount is None else [repr(amount), entry.path]
    return tuple(words)


def refuse_split(split: str | None, flag: str) -> None:
    """Refuse a ``--split`` with held-out parts, which only Megatron-LM's order has.

    Raises:
        UserError: the split has a part for validation or test.
    """
    if split is not None and any(split_shares(split)[1:]):
        raise UserError(
            f"{flag}: parts of datasets are held out only in Megatron-LM's order: give --order "
            "megatron, or hold out documents with split_folds --validation-documents and name "
            "them with --validation"
        )
