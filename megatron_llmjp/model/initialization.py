"""Initial weights that depend on the seed and the tensor's global name, not on the layout.

megatron-core seeds each pipeline stage separately, so that the same seed gives different weights in
different parallel layouts. Here every full tensor is drawn from its own seed and each rank keeps
its slice: the weights do not depend on TP, PP, VP and EP sizes.

Standard deviations are Megatron-LM's: ``init_method_std``, and ``init_method_std / sqrt(2 L)`` for
the two projections back into the residual stream; norms are 1, biases 0.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_llmjp.config.schema import Config

_RESIDUAL = ("self_attention.linear_proj.weight", "linear_fc2.weight")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

_EXPERT = r"mlp\.experts\.(?:local_experts\.(\d+)\.(\w+)\.weight|(\w+)\.weight(\d+))$"
"""Name of an expert's weight within its layer."""


@torch.no_grad()
def initialize(model: nn.Module, config: Config) -> None:
    """Initialize the weights of a model chunk with its slices of the global initial weights."""
    for name, parameter in model.named_parameters():
        name = global_name(model, name)
        if name == "output_layer.weight" and not config.model.untie_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        if name.endswith(".bias") or name.endswith("layer_norm_bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(_local_part(parameter, name, config))


def global_name(model: nn.Module, name: str) -> str:
    """Return a parameter's name with its layer number counted over all stages, from 0.

    An expert's number is counted over all expert-parallel ranks; its name does not depend on
    whether the experts of a rank are multiplied together (``linear_fc1.weight3``) or one by one.
    """
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    layer: Any = model.get_submodule(f"decoder.layers.{match[1]}")
    inner = match[2]
    if expert := re.match(_EXPERT, inner):
        number, projection = expert[1] or expert[4], expert[2] or expert[3]
        first = layer.mlp.local_expert_indices[0]
        inner = f"mlp.experts.local_experts.{first + int(number)}.{projection}.weight"
    return f"decoder.layers.{layer.layer_number - 1}.{inner}"


def _local_part(parameter: nn.Parameter, name: str, config: Config) -> Tensor:
    """Draw the full tensor ``name`` and return this rank's slice."""
    size, rank, dim = _split(parameter, name)
    split = size > 1
    shape = list(parameter.shape)
    if split:
        shape[dim] *= size
    full = _draw(name, shape, config, parameter.device)
    if not split:
        return full
    if name.endswith("linear_fc1.weight") and config.model.activation_function == "swiglu":
        halves = full.chunk(2)  # a rank holds [gate_t; up_t] of [gate; up]
        return torch.cat([half.chunk(size)[rank] for half in halves])
    return full.chunk(size, dim=dim)[rank]


def _split(parameter: nn.Parameter, name: str) -> tuple[int, int, int]:
    """Return the number of slices of a tensor, the one of this rank, and their dimension."""
    if ".experts.local_experts." in name:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        return size, parallel_state.get_expert_tensor_parallel_rank(), int("linear_fc2" in name)
    if not getattr(parameter, "tensor_model_parallel", False):
        return 1, 0, 0
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return size, rank, int(parameter.partition_dim)  # type: ignore[attr-defined]


def _draw(name: str, shape: list[int], config: Config, device: torch.device) -> Tensor:
    std = config.model.init_method_std
    if name.endswith(_RESIDUAL):
        std /= math.sqrt(2.0 * config.model.num_layers)
    if name in _VOCABULARY and config.model.vocab_size is not None:
        # The padded vocabulary size depends on the layout; embeddings of real tokens must not.
        vocab_size, padding = config.model.vocab_size, shape[0] - config.model.vocab_size
        real = _normal(name, [vocab_size, *shape[1:]], std, config, device)
        return torch.cat(
            [real, _normal(f"{name}/padding", [padding, *shape[1:]], std, config, device)]
        )
    return _normal(name, shape, std, config, device)


def _normal(
    name: str, shape: list[int], std: float, config: Config, device: torch.device
) -> Tensor:
    digest = hashlib.sha256(f"{config.training.seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)
