"""Types of stored elements, without torch.

A conversion that changes no type copies bytes: it needs names and sizes of the types, and not
torch, whose import takes longer than copying a gigabyte.
"""

from __future__ import annotations

import builtins
import re
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DType(Enum):
    """A type of elements, with its name in torch, and safetensors' code as its value."""

    float64 = "F64"
    float32 = "F32"
    float16 = "F16"
    bfloat16 = "BF16"
    float8_e4m3fn = "F8_E4M3"
    float8_e5m2 = "F8_E5M2"
    int64 = "I64"
    int32 = "I32"
    int16 = "I16"
    int8 = "I8"
    uint64 = "U64"
    uint32 = "U32"
    uint16 = "U16"
    uint8 = "U8"
    bool = "BOOL"

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element."""
        bits = re.search(r"\d+", self.value)
        return int(bits[0]) // 8 if bits else 1

    @property
    def is_floating_point(self) -> builtins.bool:
        """Whether elements are floating-point numbers."""
        return "F" in self.value

    @property
    def torch(self) -> torch.dtype:
        """The type in torch, which is imported."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found
