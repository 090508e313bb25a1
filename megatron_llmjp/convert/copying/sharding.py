"""Division of the output files of a conversion over tasks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.convert.plan import OutputFile, TensorCopy


def files_of_shard(
    files: Sequence[OutputFile], copies: Sequence[TensorCopy], number: int, count: int
) -> list[OutputFile]:
    """Return the output files of one task: consecutive ones of about equal total size.

    Files are ordered by the first tensor in them, so that a task reads few source files.

    Args:
        files: all output files.
        copies: all copies.
        number: of the task, from 0.
        count: number of tasks.
    """
    first: dict[str, int] = {}
    for position, copy in enumerate(copies):
        for slot in (slot for part in copy.write.slots for slot in part):
            first.setdefault(slot.file, position)
    ordered = sorted(files, key=lambda file: (first.get(file.name, -1), file.name))
    return [ordered[i] for i in share_evenly([file.size for file in ordered], number, count)]


def restrict_copies(copies: Sequence[TensorCopy], files: Sequence[OutputFile]) -> list[TensorCopy]:
    """Return the copies that write to these files, without their other slots."""
    names = {file.name for file in files}
    found = [TensorCopy(copy.name, copy.read, copy.write.only(names)) for copy in copies]
    return [copy for copy in found if any(copy.write.slots)]


def share_evenly(sizes: Sequence[int], number: int, count: int) -> list[int]:
    """Return the indices of one of ``count`` consecutive groups of about equal total size."""
    total, before, found = sum(sizes) or 1, 0, []
    for index, size in enumerate(sizes):
        if min(int((before + size / 2) * count / total), count - 1) == number:
            found.append(index)
        before += size
    return found
