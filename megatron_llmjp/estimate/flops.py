"""Floating-point operations (FLOPs) of a training step, counted as in Megatron-LM.

The count matches ``num_floating_point_operations`` in Megatron-LM's
``megatron/training/training.py``, core 0.12.1 to 0.20 (a file that is not in the
megatron-core wheel):

- only matrix products count, ``2 m n k`` FLOPs each; a training step performs each three times
  (forward, gradient of the input, gradient of the weight);
- causal attention counts half of its ``s x s`` scores, whether or not the kernel skips the rest;
- logits are counted over the padded vocabulary; the embedding lookup is not counted;
- of a layer with experts, the experts of a token and the shared experts count, the router does not;
- recomputation is not counted: these are model FLOPs, so that TFLOP/s divided by the peak is the
  MFU, not the HFU.

Megatron-LM until 2024, and LLM-jp's fork of that time, counted all attention scores: its TFLOP/s
are higher at the same speed, by 2.7 % for llm-jp-3 172b and by 10.8 % for 1.8b.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.schema import Config, ModelConfig

_MULTIPLY_ADD = 2
_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample, forward and backward, by component of the model."""

    attention_projections: int
    """Query, key, value and output projections of all layers."""
    attention_scores: int
    """Query times key and scores times value; causal, so half of the square."""
    feed_forward: int
    """Of dense layers, or of the experts of each token."""
    logits: int

    @property
    def total(self) -> int:
        """Sum over all components."""
        return self.attention_projections + self.attention_scores + self.feed_forward + self.logits


def flops_by_part(config: Config) -> Flops:
    """Compute the FLOPs of one sample of ``seq_length`` tokens, forward and backward.

    Raises:
        ValueError: the vocabulary size is not resolved yet.
    """
    model, s = config.model, config.data.seq_length
    h, layers = model.hidden_size, model.num_layers
    queries = model.num_attention_heads * model.head_dim
    keys_and_values = 2 * model.query_groups * model.head_dim
    factor = _MULTIPLY_ADD * _FORWARD_AND_BACKWARD
    return Flops(
        attention_projections=factor * s * layers * h * (2 * queries + keys_and_values),
        # Two products of s x s x queries; the causal mask halves them.
        attention_scores=factor * s * s * layers * queries,
        feed_forward=factor * s * _feed_forward_weights(model),
        logits=factor * s * h * config.padded_vocab_size,
    )


def _feed_forward_weights(model: ModelConfig) -> int:
    """Count the weights of all feed-forward layers that a token is multiplied with."""
    matrices = 3 if model.activation_function == "swiglu" else 2
    experts = sum(model.expert_layers)
    width = (model.num_layers - experts) * model.ffn_size
    width += experts * model.moe_router_topk * model.expert_ffn_size
    width += experts * (model.moe_shared_expert_intermediate_size or 0)
    return model.hidden_size * matrices * width


def flops_per_sample(config: Config) -> int:
    """Return the FLOPs of one sample of ``seq_length`` tokens, forward and backward."""
    return flops_by_part(config).total


def step_flops(config: Config, global_batch_size: int) -> int:
    """Return the FLOPs of one step over ``global_batch_size`` samples on all ranks."""
    return flops_per_sample(config) * global_batch_size


def tflops_per_device(config: Config, samples: int, seconds: float, devices: int) -> float:
    """Return the TFLOP/s per device when ``devices`` train ``samples`` samples in ``seconds``."""
    return step_flops(config, samples) / seconds / devices / 1e12


def compute_dtype(config: Config) -> str:
    """Return the dtype of matrix products: bf16, fp16 or fp32."""
    if config.training.bf16:
        return "bf16"
    return "fp16" if config.training.fp16 else "fp32"


def element_size(config: Config) -> int:
    """Return the bytes of one element of an activation."""
    return 2 if config.training.bf16 or config.training.fp16 else 4
