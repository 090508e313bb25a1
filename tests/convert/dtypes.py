"""Types of torch's tensors as those of the converter."""

from __future__ import annotations

import torch

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.strided_view import StridedView


def dtype_of(tensor: torch.Tensor) -> DType:
    return DType[str(tensor.dtype).removeprefix("torch.")]


def view_of(tensor: torch.Tensor) -> StridedView:
    return StridedView(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
