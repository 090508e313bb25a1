"""Reader and writer of safetensors headers.

A file consists of the header's length, a JSON header and the tensors' bytes. Source:
https://huggingface.co/docs/safetensors, "Format". The library is not used: it gives no byte
offsets, and writes a shard only from tensors in memory.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import FileTensor, byte_count, truncation_error
from megatron_llmjp.convert.plan import OutputFile, Slot
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.errors import UserError

_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"})
"""Supported types: those of weights before quantization."""

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library


def read_header(path: Path) -> dict[str, FileTensor]:
    """Read the tensors of a file, by key.

    Raises:
        UserError: the file is damaged or truncated, or a tensor's type is not supported.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LARGEST_HEADER:
            raise UserError(f"{path}: not a safetensors file (a Git LFS pointer?)")
        if 8 + length > size:
            raise truncation_error(path, 8 + length)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: damaged header ({error})") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged header: not a JSON object")
    header.pop("__metadata__", None)
    found = {key: _parse_entry(path, 8 + length, size, key, value) for key, value in header.items()}
    _check_overlap(path, found)
    return found


def _parse_entry(path: Path, base: int, size: int, key: str, value: Any) -> FileTensor:
    try:
        code, lengths, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{path}: damaged header: {key} lacks dtype, shape or data_offsets"
        ) from None
    numbers = [start, end, *(lengths if isinstance(lengths, list) else [None])]
    if any(type(n) is not int or n < 0 for n in numbers) or start > end:
        raise UserError(f"{path}: damaged header: {key} has shape {lengths} at {start} to {end}")
    if not isinstance(code, str) or code not in _DTYPES:
        raise UserError(
            f"{path}: {key} has type {code}, which is not supported; expected one of "
            f"{', '.join(sorted(_DTYPES))}"
        )
    shape, dtype = tuple(lengths), DType(code)
    if end - start != byte_count(shape, dtype):
        raise UserError(
            f"{path}: damaged header: {key} {shape} does not match its size of {end - start} bytes"
        )
    if base + end > size:
        raise truncation_error(path, base + end)
    return FileTensor(path, base + start, shape, dtype)


def _check_overlap(path: Path, tensors: dict[str, FileTensor]) -> None:
    """Refuse overlapping tensors, which the format forbids."""
    end, last = 0, ""
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end and byte_count(tensor.shape, tensor.dtype):
            raise UserError(f"{path}: damaged header: {key} and {last} overlap")
        if (reach := tensor.offset + byte_count(tensor.shape, tensor.dtype)) > end:
            end, last = reach, key


def plan_safetensors(name: str, tensors: dict[str, tuple[Shape, DType]]) -> OutputFile:
    """Lay out a file that contains these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by older transformers
    end = 0
    for key, (shape, dtype) in tensors.items():
        start, end = end, end + byte_count(shape, dtype)
        header[key] = {
            "dtype": dtype.value,
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    slots = {
        key: Slot(name, key, len(head) + header[key]["data_offsets"][0], shape, dtype)
        for key, (shape, dtype) in tensors.items()
    }
    return OutputFile(name, len(head) + end, [(0, head)], slots)
