"""Views without data, compared with torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_llmjp.convert.strided_view import StridedView
from tests.convert.dtypes import view_of

VIEWS: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: x.view(2, 3, -1),
    lambda x: x.view(3, 2, 4, 5)[1],
    lambda x: x.view(3, 2, 4, 5)[:, :-2],
    lambda x: x.view(3, 4, 2, 5)[:, -2],
    lambda x: x.view(3, 4, 2, 5)[2, :, 1:],
    lambda x: x.view(3, 4, 2, 5).permute(3, 1, 0, 2),
    lambda x: x.t(),
    lambda x: x.t().t()[4:2],
    lambda x: x.narrow(1, 3, 4),
    lambda x: x.chunk(5)[2],
    lambda x: x.chunk(5)[-1],
    lambda x: x.chunk(7, dim=1)[3],
    lambda x: x[:1].view(5, 1, 4),
]


@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_views_are_those_of_torch(number):
    tensor = torch.arange(6 * 20).view(6, 20)
    expected = VIEWS[number](tensor)
    found = VIEWS[number](StridedView.of((6, 20)))
    assert found.shape == expected.shape and found.dim() == expected.dim()
    assert found.numel() == expected.numel()
    if expected.numel():
        assert found == view_of(expected)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 0, 3), (1, 5)])
def test_contiguous_views(shape):
    assert StridedView.of(shape) == view_of(torch.empty(shape))


WRONG: list[Callable[[Any], Any]] = [
    lambda x: x.view(7, -1),
    lambda x: x.t().view(120),
    lambda x: x.narrow(0, 5, 2),
    lambda x: x.narrow(0, -1, 2),
    lambda x: x[6],
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_impossible_views_are_refused(number):
    with pytest.raises((RuntimeError, IndexError)):
        WRONG[number](torch.empty(6, 20))
    with pytest.raises(ValueError):
        WRONG[number](StridedView.of((6, 20)))
