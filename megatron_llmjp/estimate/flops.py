"""Floating point operations of a training step, as Megatron-LM counts them.

The count is that of ``num_floating_point_operations`` in Megatron-LM's
``megatron/training/training.py``, core 0.12.1 to 0.20 (the wheel of core leaves that file out):

- only matrix products count, ``2 m n k`` operations each; a training step does each three times
  (forward, gradient of the input, gradient of the weight);
- causal attention counts half of its ``s x s`` scores, whether or not the kernel skips the rest;
- the logits count over the padded vocabulary; the embedding is a look-up and counts nothing;
- a recomputed forward pass is not counted: these are the operations of the model, so that
  TFLOP/s / peak is the MFU, not the HFU.

Megatron-LM of 2024 and before, and so LLM-jp's fork of that time, counted the scores in full: its
TFLOP/s are higher for the same speed, by 2.7 % for llm-jp-3 172b and 10.8 % for 1.8b.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.schema import Config

_MULTIPLY_ADD = 2
_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Operations of one sample, forward and backward, by the part of the network."""

    attention_projections: int
    """Query, key, value and output projections of all layers."""
    attention_scores: int
    """Query times key and scores times value, causal: half of the square."""
    feed_forward: int
    logits: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.attention_projections + self.attention_scores + self.feed_forward + self.logits


def flops_by_part(config: Config) -> Flops:
    """Operations of one sample of ``seq_length`` tokens, forward and backward.

    Raises:
        ValueError: the vocabulary's size is not known yet.
    """
    model, s = config.model, config.data.seq_length
    h, layers = model.hidden_size, model.num_layers
    queries = model.num_attention_heads * model.head_dim
    keys_and_values = 2 * model.query_groups * model.head_dim
    matrices = 3 if model.activation_function == "swiglu" else 2
    factor = _MULTIPLY_ADD * _FORWARD_AND_BACKWARD
    return Flops(
        attention_projections=factor * s * layers * h * (2 * queries + keys_and_values),
        # Two products of s x s x queries, of which the causal mask leaves one half.
        attention_scores=factor * s * s * layers * queries,
        feed_forward=factor * s * layers * matrices * h * model.ffn_size,
        logits=factor * s * h * config.padded_vocab_size,
    )


def flops_per_sample(config: Config) -> int:
    """Operations of one sample of ``seq_length`` tokens, forward and backward."""
    return flops_by_part(config).total


def step_flops(config: Config, global_batch_size: int) -> int:
    """Operations of one optimizer step over ``global_batch_size`` samples, all ranks together."""
    return flops_per_sample(config) * global_batch_size


def tflops_per_device(config: Config, samples: int, seconds: float, devices: int) -> float:
    """TFLOP/s of each of ``devices`` that together train ``samples`` samples in ``seconds``."""
    return step_flops(config, samples) / seconds / devices / 1e12


def compute_dtype(config: Config) -> str:
    """Type that matrix products run in: bf16, fp16 or fp32."""
    if config.training.bf16:
        return "bf16"
    return "fp16" if config.training.fp16 else "fp32"
