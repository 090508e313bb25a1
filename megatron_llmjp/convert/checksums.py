"""The CRC-32 of a file from those of its pieces, without reading what was written."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from megatron_llmjp.convert.crc32 import joined
from megatron_llmjp.convert.plan import OutputFile


def of_file(file: OutputFile, sums: Mapping[tuple[str, int], int]) -> int:
    """The CRC-32 of a file that was filled.

    Args:
        file: its plan.
        sums: CRC-32 of the tensors in it, by file and offset.

    Raises:
        ValueError: the pieces do not cover the file, which is a bug of a format.
    """
    patches = {
        place: sums[slot.file, slot.offset].to_bytes(4, "little")
        for slot in file.slots.values()
        for place in slot.checksums
    }
    pieces = [(at, len(data), zlib.crc32(_patched(at, data, patches))) for at, data in file.fixed]
    pieces += [(s.offset, s.nbytes, sums[s.file, s.offset]) for s in file.slots.values()]
    total = position = 0
    for start, length, crc in sorted(pieces):
        if start != position:
            raise ValueError(f"{file.name}: nothing is planned at {position}")
        total = joined(total, crc, length)
        position += length
    if position != file.size:
        raise ValueError(f"{file.name}: {position} of {file.size} bytes are planned")
    return total


def _patched(start: int, data: bytes, patches: Mapping[int, bytes]) -> bytes:
    """Fixed bytes with the checksums that were written into them."""
    found = {
        place - start: four for place, four in patches.items() if 0 <= place - start < len(data)
    }
    if not found:
        return data
    changed = bytearray(data)
    for place, four in found.items():
        changed[place : place + 4] = four
    return bytes(changed)
