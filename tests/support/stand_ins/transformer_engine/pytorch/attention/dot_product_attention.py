"""Attention with explicit scores: Transformer Engine's mask types and layouts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

MASK_TYPES = ("no_mask", "causal", "padding_causal", "arbitrary")


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        assert attention_type == "self" and softmax_type == "vanilla" and window_size is None
        assert isinstance(kv_channels, int) and cp_group is None, "not part of the stand-in"
        self.heads = num_attention_heads // tp_size
        self.groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.channels = kv_channels
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout, self.tracker = attention_dropout, get_rng_state_tracker
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.register_load_state_dict_post_hook(self._accept_missing_state)

    @staticmethod
    def _accept_missing_state(module: Any, incompatible_keys: Any) -> None:
        """Accept checkpoints of releases whose attention had no extra state."""
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if "core_attention._extra_state" not in key]

    def forward(
        self,
        query_layer: Tensor | None = None,
        key_layer: Tensor | None = None,
        value_layer: Tensor | None = None,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        bf16_backward: bool | None = False,
        num_splits: int | None = 1,
        score_mod: Any = None,
        score_mod_bprop: Any = None,
        score_mod_tensors: Any = None,
        score_mod_bprop_tensors: Any = None,
        qkv_layer: Tensor | None = None,
        kv_layer: Tensor | None = None,
        qkv_interleave_dim: int = -3,
        thd_attention_policies: Any = None,
        thd_attention_policy_dispatch: str = "auto",
    ) -> Tensor:
        layout = qkv_format or self.qkv_format
        kind = attn_mask_type or self.attn_mask_type
        assert kind in MASK_TYPES and layout in ("sbhd", "bshd", "thd"), "not in the stand-in"
        assert query_layer is not None and key_layer is not None and value_layer is not None
        assert query_layer.shape[-2:] == (self.heads, self.channels)
        assert key_layer.shape[-2:] == (self.groups, self.channels)
        if layout == "thd":
            assert kind == "padding_causal" and query_layer.dim() == 3
            assert cu_seqlens_q is not None and cu_seqlens_kv is not None
            assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_kv
            assert max_seqlen_q is not None
            if not cu_seqlens_q.is_cuda:
                assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
            position = torch.arange(len(query_layer), device=query_layer.device)
            document = torch.searchsorted(cu_seqlens_q.long(), position, right=True)
            hidden = document[:, None] != document[None, :]
            hidden |= position[:, None] < position[None, :]
            return self._attend(
                *(x[:, None] for x in (query_layer, key_layer, value_layer)), hidden
            )[:, 0]
        if layout == "bshd":
            query_layer, key_layer, value_layer = (
                x.transpose(0, 1) for x in (query_layer, key_layer, value_layer)
            )
        hidden = self._hidden(kind, attention_mask, query_layer)
        output = self._attend(query_layer, key_layer, value_layer, hidden)
        return output.transpose(0, 1) if layout == "bshd" else output

    @staticmethod
    def _hidden(kind: str, attention_mask: Tensor | None, query: Tensor) -> Tensor:
        """Return which keys a query does not see; ``causal`` ignores a mask that is given."""
        length = query.shape[0]
        if kind == "no_mask":
            return torch.zeros(length, length, dtype=torch.bool, device=query.device)
        if kind == "causal":
            return torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        assert kind == "arbitrary" and attention_mask is not None
        assert attention_mask.dtype == torch.bool and attention_mask.dim() == 4
        return attention_mask

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        """Attend ``[s, b, n, d]`` where not ``hidden``; returns ``[s, b, n*d]``."""
        key, value = (x.repeat_interleave(self.heads // self.groups, dim=2) for x in (key, value))
        scores = torch.einsum("sbnd,tbnd->bnst", query, key).float() * self.scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(query.dtype)
        if self.training and self.dropout > 0.0:
            with self.tracker().fork() if self.tracker is not None else nullcontext():
                weights = F.dropout(weights, self.dropout)
        return torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)
