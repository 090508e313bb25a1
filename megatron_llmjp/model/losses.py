"""Cross entropy and z-loss over a vocabulary split by tensor parallelism, computed in chunks.

The logits are the largest tensor of a step. Softmax and gradient are computed in fp32 for a chunk
of tokens at a time, and the gradient replaces the logits: apart from them, memory is needed for one
chunk. megatron-core's cross entropy copies all logits to fp32 first. Liger-Kernel's fused linear
cross entropy is no replacement: it does not split the vocabulary, and computes the gradients of the
output layer itself, without megatron-core's sequence parallelism and gradient accumulation.

The z-loss, strength x log(Z)^2, keeps the softmax normalizer Z near 1, so that logits do not drift
(PaLM, Chowdhery et al., 2022, section 5). Z is a by-product of cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_llmjp.config.loss_chunks import loss_chunk_tokens


class GPTModelWithLoss(GPTModel):
    """A GPTModel whose last stage computes the losses in chunks; see :func:`token_losses`."""

    z_loss_strength = 0.0
    compiled_loss = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the losses ``[b, s]``, or with z-loss ``[2, b, s]``, of labels ``[b, s]``."""
        return token_losses(labels, logits, self.tp_group, self.z_loss_strength, self.compiled_loss)


def token_losses(
    labels: Tensor,
    logits: Tensor,
    group: dist.ProcessGroup,
    z_loss_strength: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """Compute cross entropy and z-loss of each token, in nats.

    The backward pass overwrites the logits with their gradient. It can run once only: autograd
    raises an error if it, or another operation that saved the logits, needs them afterwards.

    Args:
        labels: ``[b, s]``.
        logits: ``[s, b, v/t]``, contiguous, the vocabulary split over the t ranks of ``group``; not
            a leaf that requires a gradient.
        group: the tensor-parallel group.
        z_loss_strength: factor of log(Z)^2.
        compiled: whether to fuse the operations on a chunk with ``torch.compile``.

    Returns:
        The cross entropy ``[b, s]`` in fp32; with a positive ``z_loss_strength`` ``[2, b, s]``:
        cross entropy, and strength x log(Z)^2.

    Raises:
        ValueError: the logits are a leaf that requires a gradient.
    """
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits are overwritten in the backward pass and must not be a leaf")
    targets = labels.transpose(0, 1).contiguous()
    loss, log_z = _CrossEntropyAndLogZ.apply(logits, targets, group, compiled)
    if z_loss_strength > 0.0:
        loss = torch.stack([loss, z_loss_strength * log_z.square()])
    return loss.transpose(-1, -2).contiguous()


class _CrossEntropyAndLogZ(torch.autograd.Function):
    """Cross entropy and log(Z) ``[s, b]`` of logits ``[s, b, v/t]`` and targets ``[s, b]``."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute maximum, sum of exponentials and predicted logit of each token in one pass."""
        rows = logits.detach().view(-1, logits.shape[-1])
        local = targets.reshape(-1) - dist.get_rank(group) * rows.shape[1]
        owned = (local >= 0) & (local < rows.shape[1])
        columns = torch.where(owned, local, 0).unsqueeze(1)
        reduce_chunk = _on_chunk(_maximum_and_sum, compiled)
        parts = [reduce_chunk(rows[chunk]) for chunk in _chunks(rows)]
        maximum, sums = (torch.cat(part) for part in zip(*parts, strict=True))
        if dist.get_world_size(group) > 1:
            largest = maximum.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            sums *= torch.exp(maximum - largest)
            maximum = largest
        predicted = torch.where(owned, rows.gather(1, columns).squeeze(1) - maximum, 0.0)
        if dist.get_world_size(group) > 1:
            reduced = torch.stack([predicted, sums])
            dist.all_reduce(reduced, dist.ReduceOp.SUM, group)
            predicted, sums = reduced
        ctx.save_for_backward(logits, columns, owned, maximum, sums)
        ctx.compiled = compiled
        log_sums = sums.log()
        return (log_sums - predicted).view_as(targets), (log_sums + maximum).view_as(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, of_log_z: Tensor) -> tuple[Tensor, None, None, None]:
        """Overwrite the logits: d loss = softmax - onehot; d log(Z) = softmax."""
        logits, columns, owned, maximum, sums = ctx.saved_tensors
        gradient = logits.detach()
        rows = gradient.view(-1, gradient.shape[-1])
        factor = (of_loss + of_log_z).reshape(-1) / sums
        predicted = torch.exp(rows.gather(1, columns).squeeze(1) - maximum) * factor
        of_target = predicted - of_loss.reshape(-1) * owned
        write_gradient = _on_chunk(_write_gradient, ctx.compiled)
        for chunk in _chunks(rows):
            write_gradient(rows[chunk], maximum[chunk], factor[chunk])
        # In fp32 until here: next to a softmax near 1, bf16 would round the difference away.
        tokens = torch.arange(len(rows), device=rows.device)
        rows[tokens, columns.squeeze(1)] = of_target.to(rows.dtype)
        return gradient, None, None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = loss_chunk_tokens(len(rows), rows.shape[1], rows.is_cuda)
    return (slice(first, first + size) for first in range(0, len(rows), size))


@cache
def _on_chunk(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Return a function, or a function that compiles it for each shape."""
    return torch.compile(function, dynamic=False) if compiled else function


def _maximum_and_sum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row and the sum of exp(x - maximum), in fp32."""
    shifted = rows.to(torch.float32, copy=True)
    maximum = shifted.amax(dim=1)
    shifted.sub_(maximum.unsqueeze(1)).exp_()
    return maximum, shifted.sum(dim=1)


def _write_gradient(rows: Tensor, maximum: Tensor, factor: Tensor) -> None:
    """Replace each row x by factor x exp(x - maximum), computed in fp32."""
    softmax = rows.float()  # rows themselves, if they are in fp32
    softmax.sub_(maximum.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
    rows.copy_(softmax)
