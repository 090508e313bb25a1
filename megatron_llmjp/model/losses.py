"""Cross entropy with z-loss over a vocabulary split by tensor parallelism.

The z-loss, strength x log(Z)^2, keeps the softmax normalizer Z near 1, so that logits do not drift
(PaLM, Chowdhery et al., 2022, section 5). Z is a by-product of cross entropy: no second pass over
the logits, the largest tensor of a step, is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor


class GPTModelWithZLoss(GPTModel):
    """A GPTModel whose last stage returns ``[2, b, s]``: cross entropy and z-loss."""

    z_loss_strength = 0.0

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """See :func:`cross_entropy_and_z_loss`."""
        return cross_entropy_and_z_loss(labels, logits, self.z_loss_strength)


def cross_entropy_and_z_loss(labels: Tensor, logits: Tensor, strength: float) -> Tensor:
    """Compute cross entropy and z-loss of each token, in nats.

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

    Composed of megatron-core's functions, because its own ``vocab_parallel_cross_entropy`` does not
    return Z.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Map logits ``[s, b, v/t]`` and targets ``[s, b]`` to two tensors ``[s, b]``."""
        core, group = VocabParallelCrossEntropy, parallel_state.get_tensor_model_parallel_group()
        logits, logits_max = core.calculate_logits_max(logits)
        dist.all_reduce(logits_max, dist.ReduceOp.MAX, group)
        first, end = VocabUtility.vocab_range_from_per_partition_vocab_size(
            logits.size(-1), dist.get_rank(group), dist.get_world_size(group)
        )
        mask, masked_target, predicted, sums, exponentials = core.calculate_predicted_logits(
            logits, target, logits_max, first, end
        )
        reduced = torch.stack([predicted, sums])
        dist.all_reduce(reduced, dist.ReduceOp.SUM, group)
        predicted, sums = reduced
        softmax, loss = core.calculate_cross_entropy_loss(exponentials, predicted, sums)
        ctx.save_for_backward(softmax, mask, masked_target)
        return loss, sums.log() + logits_max

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Combine the gradients: d loss = softmax - onehot; d log(Z) = softmax."""
        of_loss, of_log_z = gradients
        softmax, mask, masked_target = ctx.saved_tensors
        flat, rows, update, gradient = (
            VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, mask)
        )
        gradient.mul_((of_loss + of_log_z).unsqueeze(-1))
        flat[rows, masked_target] -= update * of_loss.reshape(-1)
        return gradient, None
