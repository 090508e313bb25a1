"""Collective save of one checkpoint: sharded tensors, plain files, manifest.

A save has three steps: :func:`plan_save` assigns tensors to ranks and, for an asynchronous save,
starts to copy them to host memory; the function of the returned request writes a rank's files, in
any thread; its finalization, a collective on the main thread, writes the manifest and renames the
folder.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import megatron.core
import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

import megatron_llmjp
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import publish
from megatron_llmjp.checkpoint.host_copy import HostBuffers
from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.checkpoint.resume_checks import RunHistory
from megatron_llmjp.checkpoint.safe_unpickling import COMMON, INDEX
from megatron_llmjp.checkpoint.sharded_state import RunState, sharded_state_dict
from megatron_llmjp.checkpoint.writer import plan_write
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.folds.fingerprint import FoldFingerprint
from megatron_llmjp.data.folds.schedule import NO_SKIPPED_SAMPLES, SkippedSamples
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync


@dataclass(frozen=True)
class SaveProgress:
    """Progress of a run at a checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    folds: Mapping[str, FoldFingerprint] | None = None
    """Fingerprints of the consumed folds."""
    skips: SkippedSamples = NO_SKIPPED_SAMPLES
    history: RunHistory | None = None
    """Skipped iterations and accepted overrides."""
    metrics: Mapping[str, float] | None = None
    persistent: bool = True
    """Whether the checkpoint is kept when a newer one is complete."""
    fold_file: str | None = None
    """The run's fold file as text, so that its training data can be reconstructed later."""


@dataclass(frozen=True)
class RunDescription:
    """Configuration and tokenizer of a run, stored in each of its checkpoints."""

    config: Config
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents by name; read once, as the original files may be deleted during the run."""


def plan_save(
    root: Path,
    state: RunState,
    progress: SaveProgress,
    about: RunDescription,
    may_publish: Callable[[], None],
    host: HostBuffers | None = None,
    sync: RankSync = DEFAULT_RANK_SYNC,
) -> AsyncRequest:
    """Plan the checkpoint ``root/iter_*`` of this iteration; a collective.

    Args:
        root: the save folder.
        state: model, optimizer and scheduler to save.
        progress: progress of the run.
        about: configuration and tokenizer files.
        may_publish: called on rank 0 before the folder is renamed; raises if another run has
            acquired ``root``.
        host: buffers for a copy of all tensors, so that training continues while they are written.
            The copies may still be running on return (``host.hold_device``).
        sync: heartbeats, and barriers without a timeout.

    Returns:
        A request whose function writes this rank's files and whose finalization completes the
        folder. This function and the finalization raise errors of rank 0 (OSError, or those of
        ``may_publish``) on all ranks; the finalization raises torch's ``CheckpointException`` if a
        rank could not write its files.
    """
    sync.run_on_first_rank(
        lambda: publish.create_temporary_folder(root, progress.iteration, sync.beat)
    )
    sharded, common = save_preprocess(sharded_state_dict(state, is_loading=False))
    folder = publish.temporary_folder(root, progress.iteration)
    writer, request = plan_write(sharded, folder, sync.beat)
    if host is not None:
        writer.copy_to(host)
    plain = _plain_files(common, progress, about) if dist.get_rank() == 0 else {}

    def complete() -> None:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, writer.entries)

        def finish() -> None:
            files = {name: entry for part in parts for name, entry in part.items()}
            for name, contents in plain.items():
                files[name] = publish.write_small_file(folder, name, contents)
            files |= manifests.file_entries(folder, [INDEX])
            may_publish()
            publish.publish_checkpoint(root, _manifest(progress, dict(sorted(files.items()))))

        sync.run_on_first_rank(finish)

    request.add_finalize_fn(complete)
    return request


def write_synchronously(request: AsyncRequest, sync: RankSync = DEFAULT_RANK_SYNC) -> None:
    """Write and finalize a checkpoint synchronously; a collective.

    megatron-core's ``execute_sync`` waits for the slowest rank in a collective, which times out.
    """
    request.async_fn()
    sync.barrier()
    for complete in request.finalize_fns:
        complete()


def _plain_files(common: Any, progress: SaveProgress, about: RunDescription) -> dict[str, bytes]:
    """Return the contents of the small files by name, at the time of the call."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    files = {
        COMMON: buffer.getvalue(),
        CONFIG_FNAME: json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode(),
        manifests.CONFIG: dump_config(about.config).encode(),
    }
    if progress.fold_file is not None:
        files[manifests.FOLDS] = progress.fold_file.encode()
    for name, contents in about.tokenizer_files.items():
        files[f"{manifests.TOKENIZER}/{name}"] = contents
    return files


def _manifest(progress: SaveProgress, files: dict[str, manifests.FileEntry]) -> Manifest:
    history = progress.history
    return Manifest(
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        contents="full",
        folds=dict(progress.folds or {}),
        skips=list(progress.skips.ranges),
        skipped_iterations=dict(history.skipped_iterations) if history else {},
        overrides=list(history.overrides) if history else [],
        metrics=dict(progress.metrics or {}),
        persistent=progress.persistent,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        versions=_versions(),
        files=files,
    )


def _versions() -> dict[str, str]:
    return {
        "megatron_llmjp": megatron_llmjp.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
    }
