"""Choice of the next token from the logits: greedy, or drawn from a filtered distribution.

The filters and their order are those of transformers: repetition penalty (Keskar et al. 2019),
temperature, top-k, top-p (Holtzman et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_llmjp.generation.settings import GenerationSettings


def next_tokens(
    logits: Tensor,
    history: Tensor,
    settings: GenerationSettings,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: ``[b, v]``; minus infinity for ids that are never generated.
        history: ``[b, v]``, whether the prompt or the text of a row contains an id.
        settings: how to choose.
        generators: random generator of each row, on the device of the logits.

    Returns:
        Ids ``[b]``.
    """
    scores = filtered_scores(logits.float(), history, settings)
    if not settings.do_sample:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def filtered_scores(logits: Tensor, history: Tensor, settings: GenerationSettings) -> Tensor:
    """Return the logits after all filters; the probabilities are their softmax.

    Args:
        logits: ``[b, v]`` in fp32.
        history: as in :func:`next_tokens`.
        settings: the filters; only the repetition penalty applies to a greedy choice.

    Returns:
        ``[b, v]``; minus infinity for ids that are excluded.
    """
    scores = logits
    if settings.repetition_penalty != 1.0:
        penalty = settings.repetition_penalty
        penalized = torch.where(scores < 0.0, scores * penalty, scores / penalty)
        scores = torch.where(history, penalized, scores)
    if not settings.do_sample:
        return scores
    scores = scores / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p < 1.0:
        scores = _keep_most_probable(scores, settings.top_p)
    return scores


def _keep_most_probable(scores: Tensor, top_p: float) -> Tensor:
    """Exclude the least probable ids that together have at most the probability 1 - top_p."""
    ascending, order = scores.sort(dim=-1)
    excluded = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    excluded[..., -1] = False
    return scores.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
