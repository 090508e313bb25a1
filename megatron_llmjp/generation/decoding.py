"""Decoding loop: tokens one at a time, with the keys and values of earlier ones in a cache.

The cache is megatron-core's ``StaticInferenceContext``: one length for all sequences of a batch.
Shorter prompts are therefore padded on the left; a mask hides the padding from all other tokens.
Rotary positions are relative, so that a shift by the padding does not matter; learned positions are
counted without the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_llmjp.generation.prompts import AllowedIds
from megatron_llmjp.generation.sampling import next_tokens
from megatron_llmjp.generation.settings import GenerationSettings
from megatron_llmjp.inference.native_model import NativeModel


def generate_tokens(
    model: NativeModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    allowed: AllowedIds,
    seeds: Sequence[int],
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Generate the continuations of a batch of prompts.

    Args:
        model: the model.
        prompts: ids of each prompt: at least one, and fewer than the model's positions. A text
            also ends where the positions end.
        settings: how tokens are chosen.
        allowed: ids that may be generated.
        seeds: of the random numbers of each prompt.
        use_cache: False to compute all tokens in each step, for comparison.

    Yields:
        The next id of each prompt; None for one whose text has ended. An id that ends a text is
        yielded too.
    """
    batch = _Batch(model, prompts, settings.max_new_tokens, use_cache)
    device = model.device.torch
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    never = _never_generated(model, allowed)
    limits = [min(settings.max_new_tokens, model.max_positions - len(ids)) for ids in prompts]
    ended = [False] * len(prompts)
    for step in range(1, max(limits) + 1):
        with torch.no_grad():
            logits = batch.last_logits().masked_fill(never, -torch.inf)
            chosen = next_tokens(logits, batch.history, settings, generators)
        ids: list[int] = chosen.tolist()
        yield [None if done else i for done, i in zip(ended, ids, strict=True)]
        ended = [
            done or i in allowed.end or step >= limit
            for done, i, limit in zip(ended, ids, limits, strict=True)
        ]
        if all(ended):
            return
        batch.append(chosen)


def _never_generated(model: NativeModel, allowed: AllowedIds) -> Tensor:
    """Return ``[v]``, true for the ids that are never generated."""
    size = model.config.padded_vocab_size
    never = torch.arange(size) >= allowed.vocab_size
    never[[i for i in allowed.excluded if i < size]] = True
    return never.to(model.device.torch)


class _Batch:
    """Tokens of a batch until now, and the cache of their keys and values.

    Attributes:
        history: ``[b, v]``, whether a row contains an id.
    """

    def __init__(
        self, model: NativeModel, prompts: Sequence[Sequence[int]], new_tokens: int, cached: bool
    ) -> None:
        device = model.device.torch
        self._model = model
        length = max(map(len, prompts))
        self._padding = torch.tensor([length - len(ids) for ids in prompts], device=device)
        self._is_padded = any(len(ids) < length for ids in prompts)
        rows = [[0] * (length - len(ids)) + list(ids) for ids in prompts]
        self._tokens = torch.tensor(rows, device=device)
        self.history = torch.zeros(
            len(prompts), model.config.padded_vocab_size, dtype=torch.bool, device=device
        )
        for row, ids in enumerate(prompts):
            self.history[row, list(ids)] = True
        self._context = None
        if cached:
            self._context = StaticInferenceContext(len(prompts), length + new_tokens)

    def append(self, ids: Tensor) -> None:
        """Append an id ``[b]`` to each row."""
        self._tokens = torch.cat([self._tokens, ids.unsqueeze(1)], dim=1)
        self.history.scatter_(1, ids.unsqueeze(1), True)

    def last_logits(self) -> Tensor:
        """Compute the logits ``[b, v]`` of the last token."""
        length = self._tokens.shape[1]
        context = self._context
        first = 0 if context is None else context.sequence_len_offset
        positions = torch.arange(first, length, device=self._tokens.device)
        last = self._model.max_positions - 1  # rows that have ended may exceed it
        positions_of_tokens = (positions - self._padding.unsqueeze(1)).clamp(0, last)
        logits: Tensor = self._model.module(
            self._tokens[:, first:],
            positions_of_tokens,
            self._mask(positions, length),
            inference_context=context,
            runtime_gather_output=True,
        )
        if context is not None:
            context.increment_sequence_len_offset(length - first)
        return logits[:, -1]

    def _mask(self, queries: Tensor, length: int) -> Tensor | None:
        """Return what to add to the scores ``[b, 1, queries, length]``; None without padding.

        A token of the padding attends to itself, so that its softmax is defined.
        """
        if not self._is_padded:
            return None
        keys = torch.arange(length, device=queries.device)
        visible = keys[None, None, :] <= queries[None, :, None]
        visible = visible & (keys[None, None, :] >= self._padding[:, None, None])
        visible = visible | (keys[None, None, :] == queries[None, :, None])
        dtype = next(self._model.module.parameters()).dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=queries.device)
        return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)
