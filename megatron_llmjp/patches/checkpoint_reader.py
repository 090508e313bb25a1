"""Replacement of the storage reader in megatron-core's torch_dist checkpoint loading.

What: ``_get_filesystem_reader`` of ``megatron.core.dist_checkpointing.strategies.torch``, while a
checkpoint is loaded.

Why: megatron-core creates its reader itself and takes none as an argument. That reader loads the
index (``.metadata``) by ``pickle.load``, which executes code from the file, and reads tensors one
after another, at about half of a disk's throughput.

Remove when ``dist_checkpointing.load`` takes a storage reader, or when megatron-core's own reader
refuses code in the index and reads tensors in parallel. Neither is the case in megatron-core 0.16.1
with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import FileSystemReader


@contextmanager
def storage_reader(create: Callable[[str], FileSystemReader]) -> Iterator[None]:
    """Load torch_dist checkpoints with the reader that ``create`` returns for a folder."""
    original = torch_strategy._get_filesystem_reader
    torch_strategy._get_filesystem_reader = lambda folder, cache_metadata=False: create(folder)
    try:
        yield
    finally:
        torch_strategy._get_filesystem_reader = original
