"""Reference model in plain PyTorch: logits of a Megatron checkpoint from its unconverted files.

``--verify`` compares with these logits. Only the functions that open files are shared with the
converter: arguments are read from ``args``, names are matched in :mod:`reference_files`, and
tensors stay as each rank stores them. Each tensor-parallel rank computes with its own rows, and
row-parallel products are summed, as in Megatron (megatron/core/transformer/attention.py and
mlp.py); no tensor is concatenated or rearranged. One layer is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.verification.reference_files import RankTensors, open_rank_tensors
from megatron_llmjp.convert.verification.reference_routing import Routing, route, routing_of


def reference_logits(
    source: SourceCheckpoint,
    tokens: Tensor,
    dtype: torch.dtype | None,
    ignored: Collection[str] = (),
) -> Tensor:
    """Compute fp32 logits ``[batch, length, padded vocabulary]`` of tokens ``[batch, length]``.

    Args:
        source: checkpoint; only its format and path are used.
        tokens: input token ids.
        dtype: type to round the weights to before computing in fp32.
        ignored: arguments of the run to ignore (``--ignore-args``).
    """
    parts, args = open_rank_tensors(source.format, source.path)
    given = {name: value for name, value in vars(args).items() if name not in ignored}
    with torch.no_grad():
        return _Model(_Network.of(given), parts, dtype).logits(tokens)


@dataclass(frozen=True)
class _Network:
    """Architecture of the network, from the arguments of its run."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    rms_norm: bool
    epsilon: float
    norm_heads: bool
    rotary: bool
    inverse_frequencies: Tensor
    position_scale: float
    activation: Callable[[Tensor], Tensor]
    routing: Routing

    @staticmethod
    def of(args: dict[str, Any]) -> _Network:
        heads = args["num_attention_heads"]
        head_dim = args.get("kv_channels") or args["hidden_size"] // heads
        groups = heads
        if args.get("group_query_attention"):
            groups = args["num_query_groups"]
        elif "group_query_attention" not in args and args.get("num_key_value_heads"):
            groups = args["num_key_value_heads"]
        stretch = args.get("rotary_seq_len_interpolation_factor")
        epsilons = [args[key] for key in ("norm_epsilon", "layernorm_epsilon") if args.get(key)]
        return _Network(
            layers=args["num_layers"],
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            rms_norm="rms" in str(args.get("normalization")).lower(),
            epsilon=epsilons[0] if epsilons else 1e-5,
            norm_heads=bool(args.get("qk_layernorm")),
            rotary=args.get("position_embedding_type") == "rope"
            or bool(args.get("use_rotary_position_embeddings")),
            inverse_frequencies=_inverse_frequencies(args, head_dim),
            position_scale=1.0 / stretch if stretch else 1.0,
            activation=_activation(args),
            routing=routing_of(args),
        )


def _activation(args: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    if args.get("swiglu"):
        return _swiglu
    older = args.get("use_legacy_models", not args.get("use_mcore_models"))
    tanh = bool(args.get("bias_gelu_fusion")) and args.get("add_bias_linear") is not False
    if older and (args.get("openai_gelu") or args.get("onnx_safe")):
        tanh = bool(args.get("openai_gelu"))
    return _gelu_tanh if tanh else F.gelu


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _inverse_frequencies(args: dict[str, Any], head_dim: int) -> Tensor:
    """Return the rotary frequencies ``[rotated / 2]``, in radians per position."""
    base = float(args.get("rope_theta") or args.get("rotary_base") or 10000.0)
    percent = args.get("rotary_percent") or 1.0
    rotated = int(head_dim * percent)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    frequencies = base**-exponents
    if not args.get("use_rope_scaling"):
        return frequencies
    # LLaMA 3.1: wavelengths above 8192 are scaled, those below 2048 are kept.
    factor = float(args.get("rope_scaling_factor") or 8.0)
    turns = 8192.0 * frequencies / (2.0 * math.pi)
    kept = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


class _Model:
    def __init__(self, network: _Network, parts: RankTensors, dtype: torch.dtype | None) -> None:
        self._network, self._parts, self._dtype = network, parts, dtype

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute fp32 logits ``[batch, length, padded vocabulary]``."""
        embedding = torch.cat(self._rank_tensors("embedding.weight"))
        x = embedding[tokens]
        if not self._network.rotary:
            x = x + self._rank_tensors("positions.weight")[0][: tokens.shape[1]]
        for i in range(self._network.layers):
            x = x + self._attention(f"layers.{i}.", self._norm(f"layers.{i}.norm1", x))
            x = x + self._mlp(f"layers.{i}.", self._norm(f"layers.{i}.norm2", x))
        head = self._rank_tensors("head.weight")
        return self._norm("final_norm", x) @ (torch.cat(head) if head else embedding).T

    def _rank_tensors(self, name: str) -> list[Tensor]:
        """Read the tensors of a name, one per rank; an empty list if there is none."""
        found = [read() for read in self._parts.get(name, [])]
        return [(t if self._dtype is None else t.to(self._dtype)).float() for t in found]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self._rank_tensors(f"{name}.weight")[0]
        if self._network.rms_norm:
            mean = x.pow(2).mean(-1, keepdim=True)
            return x * torch.rsqrt(mean + self._network.epsilon) * weight
        bias = self._rank_tensors(f"{name}.bias")[0]
        return F.layer_norm(x, weight.shape, weight, bias, self._network.epsilon)

    def _column_parallel(self, name: str, x: Tensor) -> list[Tensor]:
        """Compute the outputs of each rank of a column-parallel layer."""
        weights, biases = self._rank_tensors(f"{name}.weight"), self._rank_tensors(f"{name}.bias")
        return [
            F.linear(x, weight, biases[rank] if biases else None)
            for rank, weight in enumerate(weights)
        ]

    def _row_parallel(self, name: str, inputs: list[Tensor]) -> Tensor:
        """Compute a row-parallel layer: the sum of the ranks' products, plus the bias."""
        weights, biases = self._rank_tensors(f"{name}.weight"), self._rank_tensors(f"{name}.bias")
        total = torch.stack([x @ w.T for x, w in zip(inputs, weights, strict=True)]).sum(0)
        return total + biases[0] if biases else total

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        network = self._network
        contexts = []
        for mixed in self._query_key_value(prefix, x):
            query, key, value = mixed[..., :-2, :], mixed[..., -2:-1, :], mixed[..., -1:, :]
            if network.norm_heads:
                query = self._norm(f"{prefix}query_norm", query)
                key = self._norm(f"{prefix}key_norm", key)
            if network.rotary:
                query, key = self._apply_rotary(query), self._apply_rotary(key)
            # [batch, length, groups, heads per group, d] -> [batch, groups, heads, length, d]
            q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (query, key, value))
            scores = q @ k.transpose(-1, -2) / math.sqrt(network.head_dim)
            length = x.shape[1]
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            contexts.append((weights @ v).permute(0, 3, 1, 2, 4).flatten(2))
        return self._row_parallel(f"{prefix}proj", contexts)

    def _query_key_value(self, prefix: str, x: Tensor) -> list[Tensor]:
        """Compute queries, key and value per rank.

        Each has the shape ``[batch, length, groups, heads per group + 2, d]``.
        """
        network = self._network
        per_group = network.heads // network.groups
        if f"{prefix}qkv.weight" in self._parts:
            mixed = self._column_parallel(f"{prefix}qkv", x)
            return [m.unflatten(-1, (-1, per_group + 2, network.head_dim)) for m in mixed]
        queries, pairs = (
            self._column_parallel(f"{prefix}query", x),
            self._column_parallel(f"{prefix}key_value", x),
        )
        return [
            torch.cat(
                [
                    q.unflatten(-1, (-1, per_group, network.head_dim)),
                    kv.unflatten(-1, (-1, 2, network.head_dim)),
                ],
                dim=-2,
            )
            for q, kv in zip(queries, pairs, strict=True)
        ]

    def _apply_rotary(self, x: Tensor) -> Tensor:
        """Apply rotary position embeddings to ``[batch, length, groups, heads, d]``, by halves."""
        frequencies = self._network.inverse_frequencies
        positions = torch.arange(x.shape[1], dtype=torch.float32) * self._network.position_scale
        angles = torch.outer(positions, frequencies)[:, None, None, :]
        half = frequencies.numel()
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        turned = (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        )
        return torch.cat([*turned, rest], dim=-1)

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        if f"{prefix}router.weight" not in self._parts:
            return self._feed_forward(prefix, x)
        total = self._experts(prefix, x)
        if f"{prefix}shared_fc1.weight" not in self._parts:
            return total
        shared = self._feed_forward(f"{prefix}shared_", x)
        gate = self._rank_tensors(f"{prefix}shared_gate.weight")
        return total + (torch.sigmoid(x @ gate[0].T) * shared if gate else shared)

    def _feed_forward(self, prefix: str, x: Tensor) -> Tensor:
        inner = [
            self._network.activation(part) for part in self._column_parallel(f"{prefix}fc1", x)
        ]
        return self._row_parallel(f"{prefix}fc2", inner)

    def _experts(self, prefix: str, x: Tensor) -> Tensor:
        """Compute the experts of a layer for the tokens that chose them."""
        router = self._rank_tensors(f"{prefix}router.weight")[0]
        bias = self._rank_tensors(f"{prefix}router.expert_bias")
        scores = route(x @ router.T, bias[0] if bias else None, self._network.routing)
        total = torch.zeros_like(x)
        for e in range(router.shape[0]):
            tokens = scores[..., e] > 0
            if tokens.any():
                output = self._feed_forward(f"{prefix}expert{e}.", x[tokens])
                total[tokens] += scores[..., e][tokens][:, None] * output
        return total
