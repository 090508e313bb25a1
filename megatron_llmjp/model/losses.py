"""z-loss: the cross entropy and log(Z)^2 together, over a vocabulary split by tensor parallelism.

Z is the sum of the softmax. The z-loss keeps it near 1, so that logits do not drift (PaLM,
Chowdhery et al., 2022, section 5). Cross entropy already computes Z; a second pass over the logits,
which are the largest tensor of a step, is not needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor


def add_z_loss(model: Any, strength: float) -> None:
    """Have a model's last stage return ``[2, b, s]``: cross entropy and z-loss, instead of one."""
    model.compute_language_model_loss = partial(losses_with_z, strength=strength)


def losses_with_z(labels: Tensor, logits: Tensor, strength: float) -> Tensor:
    """Cross entropy and z-loss of each token, in nats.

    Args:
        labels: ``[b, s]``.
        logits: ``[s, b, v/t]``, the vocabulary split over t tensor-parallel ranks.
        strength: factor of log(Z)^2.

    Returns:
        ``[2, b, s]``: cross entropy, and strength x log(Z)^2.
    """
    labels = labels.transpose(0, 1).contiguous()
    loss, log_z = _CrossEntropyAndLogZ.apply(logits, labels)
    return torch.stack([loss, strength * log_z.square()]).transpose(1, 2).contiguous()


class _CrossEntropyAndLogZ(torch.autograd.Function):
    """megatron-core's vocab-parallel cross entropy with log(Z) as a second result.

    Put together from megatron-core's pieces; its own function keeps Z to itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """``[s, b, v/t]`` and ``[s, b]`` -> two of ``[s, b]``."""
        pieces, group = VocabParallelCrossEntropy, parallel_state.get_tensor_model_parallel_group()
        logits, logits_max = pieces.calculate_logits_max(logits)
        dist.all_reduce(logits_max, dist.ReduceOp.MAX, group)
        first, end = VocabUtility.vocab_range_from_per_partition_vocab_size(
            logits.size(-1), dist.get_rank(group), dist.get_world_size(group)
        )
        mask, masked_target, predicted, sums, exponentials = pieces.calculate_predicted_logits(
            logits, target, logits_max, first, end
        )
        both = torch.stack([predicted, sums])
        dist.all_reduce(both, dist.ReduceOp.SUM, group)
        predicted, sums = both
        softmax, loss = pieces.calculate_cross_entropy_loss(exponentials, predicted, sums)
        ctx.save_for_backward(softmax, mask, masked_target)
        return loss, sums.log() + logits_max

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """d loss = softmax - onehot; d log(Z) = softmax."""
        of_loss, of_log_z = gradients
        softmax, mask, masked_target = ctx.saved_tensors
        flat, rows, update, gradient = (
            VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, mask)
        )
        gradient.mul_((of_loss + of_log_z).unsqueeze(-1))
        flat[rows, masked_target] -= update * of_loss.reshape(-1)
        return gradient, None
