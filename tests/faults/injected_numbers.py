"""Injected NaN, spikes and invalid token ids."""

from __future__ import annotations

from typing import Any

from tests.faults.injection import inject_at, rank

_NAN = float("nan")


def nan_at(where: str, iteration: int, which: int) -> None:
    """Set one element of a rank's loss mask, weights or gradients to NaN."""
    if rank() != which:
        return
    if where == "weight":
        inject_at(
            "a step", iteration, lambda trainer: _first(trainer).data.view(-1)[:1].fill_(_NAN)
        )
        return
    from megatron_llmjp.data import dataloader
    from megatron_llmjp.training import train_step

    hit: list[Any] = []
    inject_at("a step", iteration, hit.append)
    share, update = dataloader._on_device, train_step._clip_and_update

    def shared(*arguments: Any) -> Any:
        batch = share(*arguments)
        if hit and where == "data":
            hit.clear()
            batch["loss_mask"].view(-1)[0] = _NAN
        return batch

    def updated(*arguments: Any) -> Any:
        if hit and where == "gradient":
            _first(hit.pop()).main_grad.view(-1)[0] = _NAN
        return update(*arguments)

    dataloader._on_device, train_step._clip_and_update = shared, updated


def nan_weight_at(what: str, iteration: int, which: int = 0) -> None:
    """Set a weight of one rank to NaN when the trainer begins a phase."""
    if rank() == which:
        inject_at(what, iteration, lambda trainer: _first(trainer).data.view(-1)[:1].fill_(_NAN))


def skip_token_id_check() -> None:
    """Disable the check of token ids at the start, so that the run finds invalid ones."""
    from megatron_llmjp.data.folds import datasets as fold_datasets

    fold_datasets.largest_id = lambda index: None


def nan_in_validation() -> None:
    """Make a validation return NaN."""
    from megatron_llmjp.training import train as train_module

    train_module.evaluate = lambda *_, **__: {"valid": _NAN}


def gradients_times(factor: float, iteration: int) -> None:
    """Multiply the gradients of all steps after an iteration by a factor."""
    from megatron_llmjp.training import train_step
    from megatron_llmjp.training.trainer import Trainer

    begin, update, hit = Trainer._begin, train_step._clip_and_update, []

    def begun(self: Any, phase: str, **more: Any) -> None:
        begin(self, phase, **more)
        hit[:] = [self] if self.iteration >= iteration else []

    def updated(*arguments: Any) -> Any:
        for trainer in hit:
            for chunk in trainer.model.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.mul_(factor)
        return update(*arguments)

    Trainer._begin, train_step._clip_and_update = begun, updated  # type: ignore[method-assign]


def _first(trainer: Any) -> Any:
    return next(trainer.model.chunks[0].parameters())
