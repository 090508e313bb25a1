"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotate the first ``freqs.shape[-1]`` channels of ``[s, b, n, d]`` in fp32."""
    assert tensor_format == "sbhd" and start_positions is None and cu_seqlens is None
    assert not interleaved and cp_size == 1 and fused, "not part of the stand-in"
    angles = freqs[: t.shape[0]].float()
    turned, rest = t.split([angles.shape[-1], t.shape[-1] - angles.shape[-1]], dim=-1)
    first, second = turned.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    result = turned.float() * angles.cos() + rotated * angles.sin()
    return torch.cat([result.to(t.dtype), rest], dim=-1)
