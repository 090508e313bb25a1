"""Filters of the next token's distribution, compared with transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as theirs

from megatron_llmjp.errors import UserError
from megatron_llmjp.generation.sampling import filtered_scores, next_tokens
from megatron_llmjp.generation.settings import GenerationSettings
from tests.support.tolerances import ELEMENTWISE, assert_close

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)) * 3
LOGITS[1, 7] = LOGITS[1, 8] = LOGITS[1].max() + 1  # a tie at the edge of top-k
IDS = torch.tensor([[3, 7, 7], [1, 2, 3], [40, 0, 5], [9, 9, 9]])
HISTORY = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, IDS, True)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(0.5, 0, 0.5, 1.0), (1.3, 1, 1.0, 1.0), (0.7, 5, 0.95, 1.2), (1.0, 0, 1e-9, 0.8)],
)
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, penalty):
    settings = GenerationSettings(
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
    )
    processors = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(penalty),
            theirs.TemperatureLogitsWarper(temperature),
            *([theirs.TopKLogitsWarper(top_k)] if top_k else []),
            theirs.TopPLogitsWarper(top_p),
        ]
    )
    expected = processors(IDS, LOGITS.clone()).softmax(-1)
    found = filtered_scores(LOGITS, HISTORY, settings).softmax(-1)
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected, ELEMENTWISE)


def test_draws_follow_the_distribution():
    settings = GenerationSettings(do_sample=True, temperature=0.8, top_k=6)
    expected = filtered_scores(LOGITS[:1], HISTORY[:1], settings).softmax(-1)[0]
    rows, number = LOGITS[:1].expand(20_000, 50), 20_000
    generator = torch.Generator().manual_seed(1)
    drawn = next_tokens(rows, HISTORY[:1], settings, [generator] * number)
    found = torch.bincount(drawn, minlength=50) / number
    assert (found - expected).abs().max() < 5 * 0.5 / number**0.5  # five standard deviations
    assert set(drawn.tolist()) == set(expected.nonzero().flatten().tolist())


def test_greedy_ignores_what_concerns_draws():
    settings = GenerationSettings(temperature=9.0, top_k=3, top_p=0.1)
    assert next_tokens(LOGITS, HISTORY, settings, []).tolist() == LOGITS.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a number above 0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, found 1.5"),
        ({"top_k": -1}, "top_k: expected an integer of at least 0, found -1"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an integer of at least 1, found True"),
        ({"do_sample": "yes"}, "do_sample: expected true or false, found 'yes'"),
        ({"topp": 0.5}, "topp: unknown parameter; did you mean 'top_p'"),
    ],
)
def test_wrong_settings_are_refused_by_name(values, problem):
    with pytest.raises(UserError) as caught:
        GenerationSettings.from_mapping(values)
    assert problem in str(caught.value)
