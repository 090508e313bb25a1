"""Attention restricted to documents, against megatron-core's own attention with its dense mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_llmjp.config.loading import ConfigLayers, build_config, read_config, replace_fields
from megatron_llmjp.data.documents import (
    DOCUMENT_BOUNDARIES,
    DOCUMENT_STARTS,
    collate,
    document_starts,
)
from megatron_llmjp.model import attention
from tests.support.processes import run_ranks
from tests.support.tolerances import GRADIENT, LOSS, assert_within, distance

END, SAMPLES, LENGTH = 63, 2, 48
"""End-of-document token, samples of a micro-batch and their length."""
PRESETS = ("laptop-llama", "laptop-gpt2", "laptop-gpt-neox")
FULL = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}  # fmt: skip
SELECTIVE = {"recompute_granularity": "selective"}
CASES = {
    "dense mask": ("dense", {}),
    "dense mask, full recompute": ("dense", FULL),
    "kernel": ("kernel", {}),
    "kernel, full recompute": ("kernel", FULL),
    "kernel, selective recompute": ("kernel", SELECTIVE),
}
"""What the model makes of the boundaries, and settings."""


def micro_batch() -> Tensor:
    """Return tokens ``[b, s]``; documents end at the first and last token, and are empty."""
    tokens = torch.randint(0, END, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))
    tokens[0, [0, 9, 10, 30]] = END
    tokens[1, [20, LENGTH - 1]] = END
    return tokens


def boundaries_of(tokens: Tensor) -> Tensor:
    rows = [{"tokens": row, DOCUMENT_STARTS: document_starts(row, END)} for row in tokens]
    return collate(rows)[DOCUMENT_BOUNDARIES]


def megatrons_mask(tokens: Tensor) -> Tensor:
    """Return megatron-core's mask ``[b, 1, s, s]``, true where hidden."""
    masks = [_get_ltor_masks_and_position_ids(row, END, False, True, False, True)[0]
             for row in tokens]  # fmt: skip
    return torch.stack(masks)


@pytest.mark.parametrize("seed", range(20))
def test_boundaries_are_those_of_megatron_cores_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (3, 40), generator=generator)
    tokens[torch.rand(3, 40, generator=generator) < seed / 20] = END
    boundaries = boundaries_of(tokens)
    assert boundaries.dtype == torch.int32
    assert (len(boundaries) - 1) % 8 == 0
    assert (boundaries[0], boundaries[-1]) == (0, tokens.numel())
    assert (boundaries.diff() >= 0).all()
    mask = attention.dense_mask(boundaries, 3, 40, torch.bfloat16)
    hidden = megatrons_mask(tokens)
    assert mask.shape == hidden.shape and mask.dtype == torch.bfloat16
    assert torch.equal(mask == -torch.inf, hidden)
    assert torch.equal(mask == 0, ~hidden)


@pytest.fixture(scope="module")
def results():
    (found,) = run_ranks(compute, 1)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradients_are_those_of_megatron_core(results, preset, case):
    loss, gradient = results[preset][case]
    assert_within(loss, LOSS, "loss")
    assert_within(gradient, GRADIENT, "gradient")


@pytest.mark.parametrize("preset", PRESETS)
def test_documents_matter(results, preset):
    assert results[preset]["without documents"] > 100 * LOSS


def test_dropout_within_documents(results):
    """The first document has no effect on others; the seed of dropout has."""
    found = results["dropout"]
    assert found["other first document"] == 0.0
    assert found["other seed"] > 100 * LOSS


def compute() -> dict[str, Any]:
    """Compute all results of this file in one process with replaced torch.cuda."""
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process

    device = setup()
    process_groups.initialize(small(PRESETS[0]), single_process(), device)
    tokens = micro_batch()
    found: dict[str, Any] = {}
    for preset in PRESETS:
        expected = loss_and_gradients(preset, "reference", megatrons_mask(tokens), device)
        found[preset] = {}
        for case, (how, settings) in CASES.items():
            result = loss_and_gradients(preset, how, boundaries_of(tokens), device, **settings)
            assert result[1].keys() == expected[1].keys()
            gradients = [distance(result[1][k], expected[1][k]) for k in expected[1]]
            found[preset][case] = distance(result[0], expected[0]), max(gradients)
        without = loss_and_gradients(preset, "dense", None, device)
        found[preset]["without documents"] = distance(without[0], expected[0])
    found["dropout"] = dropout_effects(device)
    return found


def small(preset: str, **fields: Any) -> Any:
    layers = ConfigLayers()
    read_config(preset, layers)
    config = build_config(layers)
    groups = {"num_query_groups": 2} if preset == "laptop-llama" else {}
    fields = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bf16": False, **groups, **fields}
    return replace_fields(
        config, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
        seq_length=LENGTH, micro_batch_size=SAMPLES, global_batch_size=SAMPLES,
        padded_vocab_size=64, reset_attention_mask=True, **fields,
    )  # fmt: skip


def loss_and_gradients(
    preset: str, how: str, mask: Tensor | None, device: Any, **fields: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses ``[b, s]`` of tokens and the gradients of their mean."""
    config, tokens = small(preset, **fields), micro_batch()
    positions = torch.arange(LENGTH).expand_as(tokens)
    with masks_by(how):
        (model,) = build(config, device)
        losses = model(tokens, positions, mask, labels=tokens.roll(-1, 1))
        losses.mean().backward()
    return losses.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def build(config: Any, device: Any) -> Any:
    from megatron_llmjp.model import gpt

    return gpt.build_model(config, device)


@contextmanager
def masks_by(how: str) -> Iterator[None]:
    """Build models with the CPU's masks, with a GPU's, or with megatron-core's attention."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_llmjp.model import gpt

    if how == "dense":
        yield
        return
    with mock.patch.object(gpt, "_choose_document_masks", lambda *_: None):
        if how == "kernel":
            with flash_kernels_on_cpu():
                yield
            return
        with mock.patch.object(gpt, "SDPAttention", DotProductAttention):
            yield


@contextmanager
def flash_kernels_on_cpu() -> Iterator[None]:
    """Register plain attention for torch's flash kernels, which exist for GPUs only.

    torch's own ``varlen_attn`` and its backward formula call them.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward_kernel, "CPU")
        library.impl("_flash_attention_backward", backward_kernel, "CPU")
        yield


def forward_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    dropout: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute ``[t, n, d]`` and log-sum-exp ``[n, t]``, as ``aten::_flash_attention_forward``."""
    assert is_causal and dropout == 0.0
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert int(cu_q.diff().max()) <= max_q == max_k
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    outputs, sums = [], []
    for document in documents(cu_q):
        q, k, v = heads(document, query, key, value)
        scores = causal_scores(q, k, scale)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    nothing = query.new_empty(0)
    return torch.cat(outputs), torch.cat(sums, 1), nothing, nothing, nothing


def backward_kernel(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor,
    cu_q: Tensor, cu_k: Tensor, *_: Any, scale: float | None = None, **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the three gradients (Dao, 2023, arXiv:2307.08691, section 2.3)."""
    factor = scale or query.shape[-1] ** -0.5
    found = []
    for document in documents(cu_q):
        q, k, v = heads(document, query, key, value)
        d_output, out = (x[document].transpose(0, 1) for x in (gradient, output))
        softmax = (causal_scores(q, k, scale) - sums[:, document, None]).exp()
        d_softmax = d_output @ v.mT - (d_output * out).sum(-1, keepdim=True)
        d_scores = softmax * d_softmax * factor
        found.append((d_scores @ k, d_scores.mT @ q, softmax.mT @ d_output))
    d_query, d_key, d_value = (
        torch.cat(part, 1).transpose(0, 1) for part in zip(*found, strict=True)
    )
    groups = (key.shape[1], -1)
    d_key, d_value = (x.unflatten(1, groups).sum(2) for x in (d_key, d_value))
    return d_query.contiguous(), d_key, d_value


def documents(cu: Tensor) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(cu.tolist())]


def heads(
    document: slice, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads ``[n, length, d]`` of a document, keys and values repeated."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    q, k, v = (tensor[document].transpose(0, 1) for tensor in (query, key, value))
    return q, k, v


def causal_scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)


def dropout_effects(device: Any) -> dict[str, float]:
    """Return the effects of another first document and of another seed on later documents."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    (model,) = build(small("laptop-gpt2", attention_dropout=0.5), device)
    tokens = micro_batch()
    boundaries, positions = boundaries_of(tokens), torch.arange(LENGTH).expand_as(tokens)
    other = tokens.clone()
    other[1, :20] = (other[1, :20] + 1) % END

    def logits(seed: int, inputs: Tensor) -> Tensor:
        model_parallel_cuda_manual_seed(seed)
        with torch.no_grad():
            return model.train()(inputs, positions, boundaries)[1, 21:]

    expected = logits(1, tokens)
    return {
        "other first document": float((logits(1, other) - expected).abs().max()),
        "other seed": float((logits(2, tokens) - expected).abs().max()),
    }


def model_of(dropout: float = 0.0, head_size: int = 128) -> SimpleNamespace:
    return SimpleNamespace(attention_dropout=dropout, kv_channels=head_size)


@pytest.mark.parametrize(
    ("core", "dtype", "capability", "expected"),
    [
        (model_of(), torch.bfloat16, (9, 0), True),
        (model_of(), torch.float16, (8, 0), True),
        (model_of(), torch.float32, (9, 0), False),
        (model_of(dropout=0.1), torch.bfloat16, (9, 0), False),
        (model_of(head_size=100), torch.bfloat16, (9, 0), False),
        (model_of(head_size=264), torch.bfloat16, (9, 0), False),
        (model_of(), torch.float16, (7, 5), False),
    ],
)
def test_when_a_gpu_uses_the_kernel(core, dtype, capability, expected):
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        assert attention.has_document_kernel(core, dtype) is expected


@pytest.mark.parametrize(
    ("dtype", "masked", "capability", "key_heads", "groups"),
    [
        (torch.bfloat16, False, (9, 0), 2, True),
        (torch.float32, False, (9, 0), 8, False),
        (torch.bfloat16, True, (9, 0), 8, False),
        (torch.float16, False, (7, 5), 8, False),
    ],
)
def test_no_scores_are_held_on_a_gpu(dtype, masked, capability, key_heads, groups):
    """Only flash attention and cuDNN's support groups, the first for causal masks alone."""
    calls = []

    def called(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        assert not torch.backends.cuda.math_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        return query

    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch.object(F, "scaled_dot_product_attention", called),
    ):
        query = torch.empty(1, 8, 16, 32, dtype=dtype, device="cuda")
        key = torch.empty(1, 2, 16, 32, dtype=dtype, device="cuda")
        mask = torch.empty(1, 1, 16, 16, dtype=dtype, device="cuda") if masked else None
        attention.fused_attention(query, key, key, mask)
    assert calls == [(key_heads, key_heads, groups)]
    assert torch.backends.cuda.math_sdp_enabled()
