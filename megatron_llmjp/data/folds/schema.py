"""Schema of fold files, which declare the training data of a run (docs/folds.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megatron_llmjp.arguments import parse_count
from megatron_llmjp.config.run_config import LRDecayStyle, WSDDecayStyle

_BUDGETS = ("tokens", "samples", "iterations", "epochs")
_AMOUNTS = ("weight", "tokens", "epochs")

SplitPart = Literal["train", "valid", "test"]
Shuffle = Literal["documents", "blocks"]
"""What is shuffled in an epoch: all documents, with stored indices, or blocks of documents."""


Count = Annotated[PositiveInt, BeforeValidator(parse_count), Field(examples=["250K"])]
Amount = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


class FoldFileModel(BaseModel):
    """Base model of all parts of a fold file: immutable, rejects unknown keys.

    The docstring of a field is its description in the reference (docs/reference).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class BlendEntry(FoldFileModel):
    """One dataset of a blend."""

    path: str
    """Prefix of the ``.bin`` and ``.idx``, relative to the ``root`` of the file."""
    weight: Amount | None = None
    """Share of the dataset in the fold, relative to the other weights of the blend."""
    tokens: Count | None = None
    """Tokens that the fold takes from the dataset."""
    epochs: Amount | None = None
    """Epochs of the dataset that the fold takes."""
    repeat: bool = False
    """Whether the run may use more than one epoch of this dataset."""
    restart: bool = False
    """Start this fold with a new epoch of the dataset instead of continuing where it stopped."""

    @property
    def amount(self) -> tuple[str, float] | None:
        """The kind of amount and its value, if one is given."""
        given = [(k, v) for k in _AMOUNTS if (v := getattr(self, k))]
        return given[0] if given else None

    @model_validator(mode="after")
    def _one_amount(self) -> BlendEntry:
        if sum(getattr(self, k) is not None for k in _AMOUNTS) > 1:
            raise ValueError("weight, tokens and epochs are mutually exclusive: give one of them")
        return self


class FoldLearningRate(FoldFileModel):
    """Learning-rate schedule of one fold, counted from the fold's first iteration.

    Omitted settings are the run's; by default the decay ends with the fold.
    """

    lr: NonNegativeFloat | None = None
    """Peak learning rate."""
    min_lr: NonNegativeFloat | None = None
    """Learning rate at the end of the decay."""
    lr_decay_style: LRDecayStyle | None = None
    """Shape of the decay."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Iterations of linear warm-up."""
    lr_warmup_init: NonNegativeFloat | None = None
    """Learning rate at the start of the warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Iterations until the end of the decay, warm-up included."""
    lr_wsd_decay_style: WSDDecayStyle | None = None
    """WSD: shape of the final decay."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """WSD: iterations of the final decay."""


class Fold(FoldFileModel):
    """One fold: a budget and a blend."""

    name: str
    """Name of the fold, unique in the file."""
    order: Literal["folds", "megatron"] = "folds"
    """``megatron``: Megatron-LM's own sample order for this budget and blend."""
    tokens: Count | None = None
    """Budget in tokens. A fold has at most one budget."""
    samples: Count | None = None
    """Budget in samples, sequences of ``seq_length`` tokens."""
    iterations: Count | None = None
    """Budget in iterations of the run."""
    epochs: Amount | None = None
    """Budget in epochs of all datasets of the blend."""
    blend: dict[str, BlendEntry] = Field(min_length=1)
    """The datasets; also a list of them, each with ``name`` or named by the end of its path, or
    the name or names of ``blends``."""
    split: str | None = None
    """``order: megatron`` only: Megatron-LM's ``--split``; the fold takes its first part."""
    learning_rate: FoldLearningRate | None = None
    """Learning-rate schedule of this fold; by default the run's."""

    @property
    def kind(self) -> str | None:
        """Kind of the datasets' amounts: weight, tokens, epochs or None."""
        amount = next(iter(self.blend.values())).amount
        return amount[0] if amount else None

    @model_validator(mode="after")
    def _check(self) -> Fold:
        budgets = [k for k in _BUDGETS if getattr(self, k) is not None]
        if len(budgets) > 1:
            raise ValueError(f"budget given as {' and '.join(budgets)}: give only one")
        kinds = {s.amount[0] if s.amount else None for s in self.blend.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(k or "nothing" for k in kinds))
            raise ValueError(f"the blend mixes {found}: use one kind for all datasets of a fold")
        problem = next(_contradictions(self, kinds.pop(), budgets[0] if budgets else None), None)
        if problem:
            raise ValueError(problem)
        return self


def _contradictions(fold: Fold, kind: str | None, budget: str | None) -> Iterator[str]:
    if fold.order == "megatron":
        if budget in (None, "epochs"):
            yield "order: megatron needs a budget in iterations, samples or tokens"
        if kind not in (None, "weight"):
            yield f"order: megatron takes weights or no amounts, not {kind} per dataset"
        if any(source.restart for source in fold.blend.values()):
            yield "order: megatron always starts its datasets from the beginning: remove `restart`"
        return
    if fold.split is not None:
        yield "split requires `order: megatron`; otherwise declare separate validation sets"
    if budget == "epochs" and kind is not None:
        yield "a budget in epochs excludes amounts per dataset: remove them"
    if kind is None and budget != "epochs":
        yield "give each dataset weight, tokens or epochs, or give the fold epochs"
    if kind == "weight" and budget is None:
        yield "weights require a budget: give the fold tokens, samples or iterations"
    if kind == "epochs" and budget is not None:
        yield "epochs per dataset define the budget: remove the fold's budget"


class ValidationSet(FoldFileModel):
    """A held-out dataset, or one part of a blend in Megatron-LM's order."""

    path: str | None = None
    """Prefix of the ``.bin`` and ``.idx`` of a held-out dataset."""
    blend: dict[str, BlendEntry] | None = Field(None, min_length=1)
    """Instead of ``path``: a blend to validate on in Megatron-LM's order."""
    split: str | None = None
    """Megatron-LM's ``--split``, of which this set is a part; by default the whole blend."""
    part: Literal["valid", "test"] = "valid"
    """Part of ``split`` that this set is."""

    @model_validator(mode="after")
    def _one_of(self) -> ValidationSet:
        if (self.path is None) == (self.blend is None):
            raise ValueError("give either path or blend")
        if self.path is not None and self.split is not None:
            raise ValueError("split requires a blend: write `blend: {name: {path: ...}}`")
        return self


class DeclaredDataset(FoldFileModel):
    """Size of a dataset, declared for plans before its files exist."""

    tokens: Count
    """Tokens of the dataset."""


class SkipRange(FoldFileModel):
    """Skipped samples: positions ``[start, end)`` in the schedule."""

    samples: tuple[NonNegativeInt, NonNegativeInt]
    """First skipped position, and the one after the last."""

    @model_validator(mode="after")
    def _in_order(self) -> SkipRange:
        if self.samples[0] >= self.samples[1]:
            raise ValueError(
                f"[{self.samples[0]}, {self.samples[1]}] is empty: expected [START, END], which "
                "skips the samples from START up to, but not including, END"
            )
        return self


class FoldFile(FoldFileModel):
    """The contents of a fold file."""

    seed: NonNegativeInt = 1234
    """Seed of the sample order."""
    sequence_length: PositiveInt | None = None
    """If given, must equal the run's seq_length."""
    shuffle: Shuffle | None = None
    """Shuffling of all folds but those with ``order: megatron``; by default a resumed run's, or by
    the size of the datasets."""
    folds: tuple[Fold, ...] = Field(min_length=1)
    """The folds, in the order in which they are trained on."""
    validation: dict[str, ValidationSet] = {}
    """Validation sets by name."""
    skip: tuple[SkipRange, ...] = ()
    """Samples that are not trained on; the positions of the others do not change."""
    datasets: dict[str, DeclaredDataset] = {}
    """Declared sizes by path, which becomes the real path; other sizes are read from the files."""

    @field_validator("folds")
    @classmethod
    def _names_differ(cls, folds: tuple[Fold, ...]) -> tuple[Fold, ...]:
        names = [fold.name for fold in folds]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two folds are named '{sorted(twice)[0]}'")
        return folds

    def declared_tokens(self, path: str) -> int | None:
        """Return the declared tokens of the dataset at a path, if there are any."""
        entry = self.datasets.get(os.path.realpath(path))
        return None if entry is None else entry.tokens

    def dataset_paths(self) -> dict[str, str]:
        """Return the path of each dataset, with the first place in the file that declares it."""
        places: dict[str, str] = {}
        for fold in self.folds:
            for name, source in fold.blend.items():
                places.setdefault(source.path, f"fold '{fold.name}', dataset '{name}'")
        for name, held_out in self.validation.items():
            where = f"validation set '{name}'"
            if held_out.path is not None:
                places.setdefault(held_out.path, where)
            for dataset, source in (held_out.blend or {}).items():
                places.setdefault(source.path, f"{where}, dataset '{dataset}'")
        return places


class LoaderKeys(FoldFileModel):
    """Keys of a fold file that its loader resolves before the file is validated."""

    include: str | tuple[str, ...] = ()
    """Files with further ``blends`` and ``datasets``, relative to this file."""
    root: str = ""
    """Folder of the paths in this file, relative to it; ``~`` and ``$VARIABLES`` are expanded."""
    blends: dict[str, dict[str, BlendEntry]] = {}
    """Blends that folds refer to by name."""
