"""The fold file: what a run is trained on, as its user declares it (docs/folds.md)."""

from __future__ import annotations

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


Count = Annotated[PositiveInt, BeforeValidator(parse_count)]
Amount = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


class FoldFileModel(BaseModel):
    """Base of all parts of the file: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BlendEntry(FoldFileModel):
    """One dataset of a blend."""

    path: str
    """Prefix of the ``.bin`` and ``.idx``; relative to the file's ``root``."""
    weight: Amount | None = None
    tokens: Count | None = None
    epochs: Amount | None = None
    repeat: bool = False
    """Whether the run may see this dataset more than once."""
    restart: bool = False
    """Begin this fold with a new epoch of the dataset, instead of where the last fold stopped."""

    @property
    def amount(self) -> tuple[str, float] | None:
        """The kind of amount given and its value."""
        given = [(k, v) for k in _AMOUNTS if (v := getattr(self, k))]
        return given[0] if given else None

    @model_validator(mode="after")
    def _one_amount(self) -> BlendEntry:
        if sum(getattr(self, k) is not None for k in _AMOUNTS) > 1:
            raise ValueError("give one of weight, tokens and epochs")
        return self


class FoldLearningRate(FoldFileModel):
    """A learning-rate schedule of a fold's own, counted from the fold's first iteration.

    What is left out is the run's; the decay ends with the fold.
    """

    lr: NonNegativeFloat | None = None
    min_lr: NonNegativeFloat | None = None
    lr_decay_style: LRDecayStyle | None = None
    lr_warmup_iters: NonNegativeInt | None = None
    lr_warmup_init: NonNegativeFloat | None = None
    lr_decay_iters: PositiveInt | None = None
    lr_wsd_decay_style: WSDDecayStyle | None = None
    lr_wsd_decay_iters: PositiveInt | None = None


class Fold(FoldFileModel):
    """One fold: a budget and a blend."""

    name: str
    order: Literal["folds", "megatron"] = "folds"
    """``megatron``: the order Megatron-LM itself would give for this budget and blend."""
    tokens: Count | None = None
    samples: Count | None = None
    iterations: Count | None = None
    epochs: Amount | None = None
    blend: dict[str, BlendEntry] = Field(min_length=1)
    split: str | None = None
    """``order: megatron`` only: Megatron-LM's ``--split``; the fold takes its first part."""
    learning_rate: FoldLearningRate | None = None

    @property
    def kind(self) -> str | None:
        """What the amounts of the datasets are: weight, tokens, epochs, or nothing."""
        amount = next(iter(self.blend.values())).amount
        return amount[0] if amount else None

    @model_validator(mode="after")
    def _check(self) -> Fold:
        budgets = [k for k in _BUDGETS if getattr(self, k) is not None]
        if len(budgets) > 1:
            raise ValueError(f"budget given as {' and '.join(budgets)}: give one")
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
            yield f"order: megatron knows weights or none, not {kind} per dataset"
        if any(source.restart for source in fold.blend.values()):
            yield "order: megatron always begins its datasets anew: take `restart` away"
        return
    if fold.split is not None:
        yield "split goes with `order: megatron`; otherwise name validation sets of their own"
    if budget == "epochs" and kind is not None:
        yield "with epochs as budget the datasets carry no amounts of their own"
    if kind is None and budget != "epochs":
        yield "the datasets need weight, tokens or epochs; or give the fold epochs"
    if kind == "weight" and budget is None:
        yield "weights need a budget: give the fold tokens, samples or iterations"
    if kind == "epochs" and budget is not None:
        yield "epochs per dataset are the budget: take the fold's away"


class ValidationSet(FoldFileModel):
    """A dataset held out, or one part of a blend in Megatron-LM's order."""

    path: str | None = None
    """Prefix of the ``.bin`` and ``.idx`` of a dataset held out."""
    blend: dict[str, BlendEntry] | None = Field(None, min_length=1)
    """Instead of ``path``: the blend that Megatron-LM would validate on."""
    split: str | None = None
    """Megatron-LM's ``--split``, of which this set is a part; the whole blend when not given."""
    part: Literal["valid", "test"] = "valid"

    @model_validator(mode="after")
    def _one_of(self) -> ValidationSet:
        if (self.path is None) == (self.blend is None):
            raise ValueError("give one of path and blend")
        if self.path is not None and self.split is not None:
            raise ValueError("split needs a blend: write `blend: {name: {path: ...}}`")
        return self


class SkipRange(FoldFileModel):
    """Samples that are left out: positions ``[start, end)`` in the schedule."""

    samples: tuple[NonNegativeInt, NonNegativeInt]

    @model_validator(mode="after")
    def _in_order(self) -> SkipRange:
        if self.samples[0] >= self.samples[1]:
            raise ValueError(
                f"[{self.samples[0]}, {self.samples[1]}] holds no sample: the first number is the "
                "first sample left out, the second the first one kept again"
            )
        return self


class FoldFile(FoldFileModel):
    """The contents of a fold file."""

    seed: NonNegativeInt = 1234
    sequence_length: PositiveInt | None = None
    """Must equal the run's seq_length where it is given."""
    folds: tuple[Fold, ...] = Field(min_length=1)
    validation: dict[str, ValidationSet] = {}
    skip: tuple[SkipRange, ...] = ()

    @field_validator("folds")
    @classmethod
    def _names_differ(cls, folds: tuple[Fold, ...]) -> tuple[Fold, ...]:
        names = [fold.name for fold in folds]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two folds are named '{sorted(twice)[0]}'")
        return folds

    def dataset_paths(self) -> dict[str, str]:
        """The path of every dataset, and the first place that names it."""
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
