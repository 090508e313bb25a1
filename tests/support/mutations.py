"""Mutations of the trainer that tests must detect; each is a typical silent error."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock


def mutated(name: str | None) -> AbstractContextManager[Any]:
    """Return a context manager that applies the named mutation; None for no mutation."""
    return MUTATIONS[name]() if name else nullcontext()


def tied_embeddings_apart() -> AbstractContextManager[Any]:
    """Do not sum the gradients of the embedding copies on the first and last stage."""
    module = "megatron.core.distributed.finalize_model_grads"
    return _patched(f"{module}._allreduce_word_embedding_grads", lambda *_, **__: None)


def norms_apart() -> AbstractContextManager[Any]:
    """Do not sum the gradients of norms over the sequence-parallel ranks."""
    module = "megatron.core.distributed.finalize_model_grads"
    return _patched(f"{module}._allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)


def tokens_weigh_alike() -> AbstractContextManager[Any]:
    """Weight tokens equally instead of micro-batches."""
    from megatron_llmjp.model import gpt

    right = gpt.transformer_config

    def wrong(*arguments: Any) -> Any:
        core = right(*arguments)
        core.calculate_per_token_loss = True
        return core

    return mock.patch.object(gpt, "transformer_config", wrong)


def everything_decays() -> AbstractContextManager[Any]:
    """Apply weight decay to norms and biases."""
    return _patched("megatron.core.optimizer.get_standard_config_overrides", lambda _: {})


def schedule_ahead() -> AbstractContextManager[Any]:
    """Use the learning rate of the next step from the second step on."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    right: Callable[[Any, int], None] = OptimizerParamScheduler.step
    ahead = []

    def wrong(self: Any, increment: int) -> None:
        if increment and not ahead:
            ahead.append(True)
            right(self, increment)
        right(self, increment)

    return mock.patch.object(OptimizerParamScheduler, "step", wrong)


MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    f.__name__: f
    for f in (
        tied_embeddings_apart,
        norms_apart,
        tokens_weigh_alike,
        everything_decays,
        schedule_ahead,
    )
}


def _patched(name: str, function: Callable[..., Any]) -> AbstractContextManager[Any]:
    module, _, attribute = name.rpartition(".")
    return mock.patch.object(importlib.import_module(module), attribute, function)
