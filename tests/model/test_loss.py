"""z-loss over a split vocabulary against the formula on one process: values and gradients."""

from __future__ import annotations

import pytest

from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, assert_within

SEQUENCE, BATCH, VOCABULARY, STRENGTH = 5, 3, 16, 0.3


def compare(ranks: int) -> list[float]:
    """Largest differences on this rank: losses, z-losses, gradients, megatron-core's own loss.

    The first three are relative to the largest value of the formula in fp64.
    """
    import torch
    import torch.distributed as dist

    from megatron_llmjp.model.losses import cross_entropy_and_z_loss
    from megatron_llmjp.parallel.device import setup

    setup()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=ranks, create_gloo_process_groups=False
    )
    torch.manual_seed(1)
    logits = torch.randn(SEQUENCE, BATCH, VOCABULARY) * 9
    whole = logits.double().requires_grad_()
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    weights = torch.rand(2, BATCH, SEQUENCE)  # different gradients for the two losses

    log_z = torch.logsumexp(whole, dim=-1).transpose(0, 1)
    expected = torch.stack(
        [
            torch.nn.functional.cross_entropy(
                whole.transpose(0, 1).flatten(0, 1), labels.flatten(), reduction="none"
            ).view(BATCH, SEQUENCE),
            STRENGTH * log_z**2,
        ]
    )
    (expected * weights).sum().backward()

    def own(full: torch.Tensor) -> torch.Tensor:
        return full.chunk(ranks, dim=-1)[dist.get_rank()]

    part = own(logits).clone().requires_grad_()
    found = cross_entropy_and_z_loss(labels, part * 1.0, STRENGTH)
    (found * weights).sum().backward()
    alone = tensor_parallel.vocab_parallel_cross_entropy(
        own(logits).clone(), labels.transpose(0, 1).contiguous()
    )
    assert found.shape == (2, BATCH, SEQUENCE)
    pairs = [(found[0], expected[0]), (found[1], expected[1]), (part.grad, own(whole.grad))]
    differences = [(one - other) / other.abs().max() for one, other in pairs]
    differences.append(found[0].transpose(0, 1) - alone)
    return [float(difference.abs().max()) for difference in differences]


@pytest.mark.parametrize("ranks", [2])
def test_z_loss(ranks):
    for losses, z_losses, gradients, core in run_ranks(compare, ranks, ranks):
        for value, difference in (("loss", losses), ("z-loss", z_losses), ("gradient", gradients)):
            assert_within(difference, ELEMENTWISE, value)
        assert core == 0.0  # `lm loss` is the one that a run without z-loss logs
