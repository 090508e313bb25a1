"""The losses in chunks against megatron-core's cross entropy and the formula: values, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, GRADIENT_NORM, assert_within, distance

SEQUENCE, BATCH, VOCABULARY, STRENGTH = 5, 3, 16, 0.3
BFLOAT16_ROUNDING = 2**-8
"""Largest distance of a number from its neighbor in bf16, relative to the number."""


def begin(ranks: int) -> Any:
    """Form a tensor-parallel group of all ranks and return it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_llmjp.config import loss_chunks
    from megatron_llmjp.parallel.device import setup

    setup()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=ranks, create_gloo_process_groups=False
    )
    # Chunks of four tokens; the last one is incomplete.
    loss_chunks.CPU_CHUNK_BYTES = 7 * 4 * VOCABULARY // ranks
    assert loss_chunks.loss_chunk_tokens(SEQUENCE * BATCH, VOCABULARY // ranks, gpu=False) == 4
    return parallel_state.get_tensor_model_parallel_group()


def compare(ranks: int) -> dict[str, float]:
    """Distances from the formula in fp64 and from megatron-core's cross entropy, on this rank."""
    from megatron_llmjp.model.losses import token_losses

    group = begin(ranks)
    torch.manual_seed(1)
    logits = torch.randn(SEQUENCE, BATCH, VOCABULARY) * 9 + 20
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    logits[0, 0, labels[0, 0]] = 60.0  # a probability near 1, whose gradient is near 0
    weights = torch.rand(2, BATCH, SEQUENCE)  # different gradients for the two losses

    def own(full: torch.Tensor) -> torch.Tensor:
        return full.chunk(ranks, dim=-1)[group.rank()]

    whole = logits.double().requires_grad_()
    log_z = torch.logsumexp(whole, dim=-1).transpose(0, 1)
    ones = torch.nn.functional.one_hot(labels.transpose(0, 1), VOCABULARY)
    lm_loss = log_z - (whole * ones).sum(dim=-1).transpose(0, 1)
    expected = torch.stack([lm_loss, STRENGTH * log_z**2])
    (expected * weights).sum().backward()
    part = own(logits).clone().requires_grad_()
    found = token_losses(labels, part * 1.0, group, STRENGTH)
    (found * weights).sum().backward()
    assert found.shape == (2, BATCH, SEQUENCE) and found.is_contiguous()
    distances = {
        "loss": distance(found[0], expected[0]),
        "z-loss": distance(found[1], expected[1]),
        "gradient": distance(part.grad, own(whole.grad)),
    }
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for function in (token_losses, core_losses):
            part = own(logits).to(dtype).requires_grad_()
            found = function(labels, part * 1.0, group)
            assert found.shape == (BATCH, SEQUENCE) and found.dtype == torch.float32
            (found * weights[0]).sum().backward()
            assert part.grad.dtype == dtype
            results.append((found.detach(), part.grad))
        (ours, our_gradient), (theirs, their_gradient) = results
        distances[f"{dtype} loss, core's"] = distance(ours, theirs)
        scale = their_gradient.abs().max() if dtype == torch.float32 else their_gradient.abs()
        relative = (our_gradient - their_gradient).abs() / (scale + 1e-30)
        distances[f"{dtype} gradient, core's"] = float(relative.max())
    return distances


def core_losses(labels: torch.Tensor, logits: torch.Tensor, _: Any) -> torch.Tensor:
    """Return megatron-core's cross entropy ``[b, s]``."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_equal_the_formula_and_megatron_core(ranks):
    for distances in run_ranks(compare, ranks, ranks):
        for name, found in distances.items():
            half = "bfloat16 gradient" in name
            assert_within(found, BFLOAT16_ROUNDING if half else ELEMENTWISE, name)


MODELS: dict[str, tuple[str, ...]] = {
    "untied": ("--config", "laptop-llama"),
    "tied, recomputed": ("--config", "laptop-gpt2", "--recompute-granularity", "full",
                         "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    "untied, bf16": ("--config", "laptop-gpt-neox", "--bf16"),
}  # fmt: skip


def train_models(ranks: int) -> dict[str, list[float]]:
    """Distances of loss and all gradients of models from those with megatron-core's loss."""
    from megatron.core.models.gpt import GPTModel

    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model import losses
    from megatron_llmjp.model.gpt import build_model

    begin(ranks)
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.process_groups import set_random_seed

    found = {}
    for name, words in MODELS.items():
        layout = ["--tensor-model-parallel-size", str(ranks)]
        layout += ["--sequence-parallel"] if ranks > 1 else []
        config = parse([*words, *layout, "--vocab-size", "64", "--hidden-size", "32",
                        "--num-layers", "2", "--ffn-hidden-size", "64",
                        "--hidden-dropout", "0", "--attention-dropout", "0"]).config  # fmt: skip
        set_random_seed(1)
        (model,) = build_model(config, setup())
        assert type(model) is losses.GPTModelWithLoss
        torch.manual_seed(3)
        tokens, labels = torch.randint(64, (2, 2, 32))
        positions = torch.arange(32).expand(2, 32)
        results = []
        for loss_function in (type(model).compute_language_model_loss, None):
            if loss_function is None:
                model.compute_language_model_loss = lambda *args, model=model: (
                    GPTModel.compute_language_model_loss(model, *args)
                )
            model.zero_grad()
            loss = model(tokens, positions, None, labels=labels).mean()
            loss.backward()
            gradients = [p.grad.float().flatten() for p in model.parameters()]
            results.append((float(loss), torch.cat(gradients)))
        (loss, gradient), (core_loss, core_gradient) = results
        found[name] = [distance(loss, core_loss), distance(gradient, core_gradient)]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_models_have_the_gradients_of_megatron_core(ranks):
    for found in run_ranks(train_models, ranks, ranks):
        for name, (loss, gradient) in found.items():
            assert_within(loss, ELEMENTWISE, f"{name}: loss")
            tolerance = 2 * BFLOAT16_ROUNDING if "bf16" in name else GRADIENT_NORM
            assert_within(gradient, tolerance, f"{name}: gradient")


def misuse() -> list[str]:
    """Errors after the logits were overwritten, and of logits that must not be."""
    from megatron_llmjp.model.losses import token_losses

    group = begin(1)
    labels, errors = torch.zeros(BATCH, SEQUENCE, dtype=torch.long), []
    part = torch.randn(SEQUENCE, BATCH, VOCABULARY, requires_grad=True)

    def backward_twice() -> None:
        loss = token_losses(labels, part * 1.0, group).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    def needed_elsewhere() -> None:
        logits = part * 1.0
        loss = logits.square().sum()
        (loss + token_losses(labels, logits, group).sum()).backward()

    def differentiate_twice() -> None:
        factor = torch.ones(1, requires_grad=True)
        loss = (token_losses(labels, part * 1.0, group) * factor).sum()
        (gradient,) = torch.autograd.grad(loss, part, create_graph=True)
        gradient.sum().backward()

    def leaf() -> None:
        token_losses(labels, part, group)

    for function in (backward_twice, needed_elsewhere, differentiate_twice, leaf):
        try:
            function()
            errors.append("none")
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    logits = part * 1.0
    storage = logits.data_ptr()
    gradients = []
    logits.register_hook(lambda gradient: gradients.append(gradient.data_ptr()))
    token_losses(labels, logits, group).sum().backward()
    assert gradients == [storage], "the gradient does not replace the logits"
    with torch.no_grad():
        token_losses(labels, part, group)
    return errors


def test_overwritten_logits_are_not_used():
    twice, elsewhere, differentiated, leaf = run_ranks(misuse, 1)[0]
    assert "modified by an inplace operation" in twice
    assert "modified by an inplace operation" in elsewhere
    assert "once_differentiable" in differentiated
    assert "must not be a leaf" in leaf


def measure_peak() -> dict[str, float]:
    """Bytes allocated at once by both passes in addition to the logits, per element of a chunk."""
    from megatron_llmjp.config import loss_chunks
    from megatron_llmjp.model.losses import token_losses
    from tests.estimate.test_memory import largest_allocation

    group = begin(1)
    tokens, vocabulary, chunk = 96, 4096, 8 * 4096
    loss_chunks.CPU_CHUNK_BYTES = 4 * chunk
    labels, found = torch.zeros(1, tokens, dtype=torch.long), {}
    for function in (token_losses, core_losses):
        for dtype in (torch.float32, torch.bfloat16):
            part = torch.randn(tokens, 1, vocabulary, dtype=dtype, requires_grad=True)

            def both_passes(part=part, function=function) -> None:
                function(labels, part.view_as(part), group).sum().backward()

            part.grad = torch.zeros_like(part)
            found[f"{function.__name__} {dtype}"] = largest_allocation(both_passes) / chunk
    return found


def test_losses_hold_one_chunk_in_fp32():
    found = run_ranks(measure_peak, 1)[0]
    assert all(4 <= found[f"token_losses torch.{name}"] < 5 for name in ("float32", "bfloat16"))
    assert found["core_losses torch.bfloat16"] > 16  # all logits in fp32: the measurement sees them
