"""Faults that a test must find: each changes one thing that a trainer gets wrong in silence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock


def mutated(name: str | None) -> AbstractContextManager[Any]:
    """The fault of this name while the context lasts; none without a name."""
    return MUTATIONS[name]() if name else nullcontext()


def tied_embeddings_apart() -> AbstractContextManager[Any]:
    """The gradients of the first and the last stage's copy of the embedding are not summed."""
    module = "megatron.core.distributed.finalize_model_grads"
    return _patched(f"{module}._allreduce_word_embedding_grads", lambda *_, **__: None)


def norms_apart() -> AbstractContextManager[Any]:
    """Norms' gradients, each of a part of the sequence, are not summed under sequence parallel."""
    module = "megatron.core.distributed.finalize_model_grads"
    return _patched(f"{module}._allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)


def tokens_weigh_alike() -> AbstractContextManager[Any]:
    """The gradient is the mean over tokens, where each micro-batch should weigh the same."""
    from megatron_llmjp.model import gpt

    right = gpt.transformer_config

    def wrong(*arguments: Any) -> Any:
        core = right(*arguments)
        core.calculate_per_token_loss = True
        return core

    return mock.patch.object(gpt, "transformer_config", wrong)


def everything_decays() -> AbstractContextManager[Any]:
    """Weight decay touches norms and biases."""
    return _patched("megatron.core.optimizer.get_standard_config_overrides", lambda _: {})


def schedule_ahead() -> AbstractContextManager[Any]:
    """From the second step on, every step applies the learning rate of the next one."""
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
