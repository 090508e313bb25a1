"""Setup of a run: save folder lock, checkpoint verification, data, model, optimizer, saver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import run_lock as locks
from megatron_llmjp.checkpoint import sharded_state
from megatron_llmjp.checkpoint.resume import Resume
from megatron_llmjp.checkpoint.run_lock import RunLock
from megatron_llmjp.checkpoint.save import RunDescription
from megatron_llmjp.checkpoint.saver import FoldEnds, Saver
from megatron_llmjp.checkpoint.sharded_state import RunState
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset import FoldDataset, Sample, ValidationDataset
from megatron_llmjp.data.folds.datasets import save_facts
from megatron_llmjp.data.indices.deferred_check import DeferredCheck
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.index_cache import ensure_indices
from megatron_llmjp.data.indices.prefetch import IndexPrefetcher
from megatron_llmjp.errors import RunError, UserError
from megatron_llmjp.filesystem import no_heartbeat, warn
from megatron_llmjp.formatting import format_count
from megatron_llmjp.model.gpt import build_model
from megatron_llmjp.model.kernels import choose_kernels
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.process_groups import (
    DEFAULT_RANK_SYNC,
    RankSync,
    is_first_rank,
)
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.parallel.rendezvous import all_gather_from_store
from megatron_llmjp.report.jobs import TRAINING_STARTED
from megatron_llmjp.run import Run, resolve_run
from megatron_llmjp.training.batch_iterator import SamplesWithDatasetId
from megatron_llmjp.training.optimizer import (
    LearningRateSchedule,
    RunScheduler,
    apply_config_after_load,
    build_optimizer,
    wrap_for_data_parallel,
    wrap_half_precision,
)
from megatron_llmjp.training.train_step import configure_schedules

RETRY_PAUSES = (0, 1, 5, 20)
"""Seconds before each attempt, as long as ranks find different checkpoints."""


@dataclass(frozen=True)
class RunDatasets:
    """Training and validation datasets of a run, and the prefetch of their sample indices."""

    training: Dataset[Sample]
    validation: dict[str, ValidationDataset]
    indices: IndexPrefetcher


@dataclass(frozen=True)
class ModelAndOptimizer:
    """Model chunks of this rank with their optimizer and parameter scheduler."""

    chunks: list[Any]
    optimizer: Any
    scheduler: RunScheduler
    counters: dict[str, Any]
    """Counters loaded from the checkpoint, by name; empty in a new run."""


def open_datasets(run: Run, ranks: Ranks, beat: Callable[[], None] = no_heartbeat) -> RunDatasets:
    """Open the datasets and build the sample indices that are needed first.

    Called before process groups exist: building an index may take longer than the timeout of a
    collective. ``beat`` is called after each index.
    """
    epochs = _epochs(run)
    data = FoldDataset(run.schedule, epochs)
    validation = _validation_datasets(run, epochs)
    indices = IndexPrefetcher(
        data,
        first_on_machine=ranks.local_rank == 0,
        log=print if ranks.is_first else lambda text: None,
        heartbeat=beat,
        check=DeferredCheck(run.datasets, run.cache) if ranks.is_first else None,
    )
    _, consumed = initial_progress(run)
    held_out = [index for dataset in validation.values() for index in dataset.indices]
    indices.start(consumed, BatchSizeSchedule(run.config).at(consumed), held_out)
    if ranks.local_rank == 0:
        save_facts(run.datasets, run.cache)
    return RunDatasets(SamplesWithDatasetId(data), validation, indices)


def open_validation_sets(
    run: Run, ranks: Ranks, beat: Callable[[], None] = no_heartbeat
) -> dict[str, ValidationDataset]:
    """Open only the validation sets and build their indices, with a heartbeat after each."""
    validation = _validation_datasets(run, _epochs(run))
    indices = [index for dataset in validation.values() for index in dataset.indices]
    ensure_indices(indices, thorough=ranks.local_rank == 0, done=beat)
    return validation


def _epochs(run: Run) -> EpochDatasets:
    vocab_size = max(run.tokenizer.vocab_size, run.config.model.vocab_size or 0)
    return EpochDatasets(run.config.data, run.tokenizer, run.cache, vocab_size, run.datasets)


def _validation_datasets(run: Run, epochs: EpochDatasets) -> dict[str, ValidationDataset]:
    return {name: ValidationDataset(held_out, epochs) for name, held_out in run.validation.items()}


def initial_progress(run: Run) -> tuple[int, int]:
    """Return the iteration and the consumed samples that the run starts from."""
    if run.resume is None or run.config.checkpoint.finetune:
        return 0, 0
    return run.resume.manifest.iteration, run.resume.manifest.consumed_samples


def setup_model_and_optimizer(
    run: Run, device: Device, rates: LearningRateSchedule, sync: RankSync = DEFAULT_RANK_SYNC
) -> ModelAndOptimizer:
    """Build model, optimizer and scheduler, and load the checkpoint if there is one."""
    config = run.config
    chunks = wrap_for_data_parallel(build_model(config, device), config)
    if run.resume is not None and config.checkpoint.finetune:
        sharded_state.load_checkpoint(run.resume.folder, RunState(chunks), sync)
    optimizer = build_optimizer(chunks, config)
    scheduler = RunScheduler(optimizer, rates)
    configure_schedules(chunks, optimizer, config)
    counters: dict[str, Any] = {}
    if run.resume is not None and not config.checkpoint.finetune:
        counters = sharded_state.load_checkpoint(
            run.resume.folder, RunState(chunks, optimizer, scheduler), sync
        )
        apply_config_after_load(optimizer, scheduler, config)
    return ModelAndOptimizer(chunks, optimizer, scheduler, counters)


def build_saver(
    run: Run,
    sizes: BatchSizeSchedule,
    check_lock: Callable[[], None],
    sync: RankSync = DEFAULT_RANK_SYNC,
) -> Saver:
    """Build the saver; ``check_lock`` raises if another run has taken the save folder."""
    schedule = run.schedule
    samples = tuple(schedule.sample_range(fold)[1] for fold in schedule.folds)
    iterations = frozenset(sizes.iteration_of(end - 1) for end in samples if end > 0)
    about = RunDescription(run.config, _tokenizer_files(run))
    return Saver(about, FoldEnds(samples, iterations), check_lock, initial_progress(run)[0], sync)


def _tokenizer_files(run: Run) -> dict[str, bytes]:
    """Return the tokenizer files, and the files that the loaded checkpoint stores with them."""
    paths = run.tokenizer.files()
    if run.resume is not None:
        stored = (manifests.GENERATION, manifests.CHAT_TEMPLATE)
        kept = [run.resume.folder / name for name in stored]
        paths = {**{path.name: path for path in kept if path.is_file()}, **paths}
    return {name: path.read_bytes() for name, path in paths.items()}


def load_weights(run: Run, device: Device, sync: RankSync = DEFAULT_RANK_SYNC) -> list[Any]:
    """Build the model and load its weights from the checkpoint that the run starts from."""
    assert run.resume is not None
    chunks = wrap_half_precision(build_model(run.config, device), run.config)
    sharded_state.load_checkpoint(run.resume.folder, RunState(chunks), sync)
    return chunks


def print_run_summary(run: Run, chunks: list[Any], ranks: Ranks, device: Device) -> None:
    """Print layout, model, data and notes on the first rank; all ranks call it and wait for it."""
    parallel = run.config.parallel
    data_parallel = ranks.world_size // parallel.model_parallel_size
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    tokens = run.schedule.total_samples * run.schedule.sequence_length
    sizes = BatchSizeSchedule(run.config).sizes()
    growing = f"{sizes[0]} growing to " if len(sizes) > 1 else ""
    layers = choose_kernels(device, run.config)
    print_rank_0(
        f"{ranks.world_size}{TRAINING_STARTED}{ranks.launcher} on {device.name}: "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x DP {data_parallel}\n"
        f"layers: {layers}; {format_count(parameters)} parameters on the first rank\n"
        f"data: {len(run.schedule.folds)} folds, {format_count(tokens)} tokens, "
        f"{run.train_iters} iterations of {growing}{sizes[-1]} samples"
    )
    for note in (*run.notes, *half_precision_notes(run.config, device)):
        print_rank_0(f"note: {note}")
    if run.resume is not None:
        action = "loading weights from" if run.config.checkpoint.finetune else "resuming from"
        print_rank_0(f"{action} {run.resume.folder}")
    dist.barrier()


def half_precision_notes(config: Config, device: Device) -> list[str]:
    """Return a note if the run uses bf16 or fp16 on a CPU, where they are slower than fp32."""
    kind = "bf16" if config.training.bf16 else "fp16" if config.training.fp16 else None
    if kind is None or device.is_cuda:
        return []
    return [
        f"{kind} is slower than fp32 on a CPU: use --no-{kind} (checkpoints can be resumed in "
        "either precision)"
    ]


def print_rank_0(text: str) -> None:
    """Print on the first rank only."""
    if is_first_rank():
        print(text, flush=True)


@dataclass(frozen=True)
class LockedRun:
    """A run whose save folder is locked."""

    run: Run
    check_lock: Callable[[], None]
    """Raises if another run has taken the save folder."""


@contextmanager
def locked_run(run: Run, ranks: Ranks, store: Any, beat: Callable[[], None]) -> Iterator[LockedRun]:
    """Lock the run's save folder, and choose a checkpoint that all ranks agree on.

    Checksums are verified with ``verify_checkpoint``, or if the last run in the save folder was
    killed; each rank reads a share of the files. A damaged checkpoint is skipped for the previous
    one.

    Args:
        run: the resolved run.
        ranks: rank and world size of this process.
        store: key-value store shared by all ranks.
        beat: heartbeat, called after each file that was read.

    Raises:
        UserError: another run holds the folder, or no checkpoint is complete.
        RunError: the file system of the folder does not respond.
    """
    with ExitStack() as stack:
        lock, was_killed = _lock_save_folder(run, ranks, store, stack)
        run = _agree_on_checkpoint(run, ranks, store)
        if was_killed or run.config.checkpoint.verify_checkpoint:
            run = _verify_checkpoint(run, ranks, store, beat)
        yield LockedRun(run, lock.check if lock is not None else _no_check)


def _no_check() -> None:
    """Do nothing: only the first rank holds the lock."""


def _lock_save_folder(
    run: Run, ranks: Ranks, store: Any, stack: ExitStack
) -> tuple[RunLock | None, bool]:
    """Return the lock (on the first rank) and whether the last run was killed (on all ranks)."""
    save = run.config.checkpoint.save
    if save is None or run.config.training.eval_only:
        return None, False
    lock, answer = None, {"mistake": "", "failure": "", "was_killed": False}
    if ranks.is_first:
        try:
            lock = stack.enter_context(locks.lock_save_folder(Path(save), warn))
            answer["was_killed"] = lock.previous is not None
        except UserError as error:
            answer["mistake"] = str(error)
        except RunError as error:
            answer["failure"] = str(error)
    first = all_gather_from_store(store, ranks, "save folder", answer)[0]
    if first["mistake"]:
        raise UserError(first["mistake"])
    if first["failure"]:
        raise RunError(first["failure"])
    return lock, first["was_killed"]


def _agree_on_checkpoint(run: Run, ranks: Ranks, store: Any) -> Run:
    """Resolve the run again until all ranks choose the same checkpoint.

    They may differ at first if the last run in the folder was publishing its last checkpoint, or
    while caches of a network file system differ between machines.

    Raises:
        RunError: ranks still find different checkpoints.
    """
    for pause in RETRY_PAUSES:
        if pause:
            time.sleep(pause)
            run = resolve_run(run.requested, ranks.world_size)
        chosen = str(run.resume.folder) if run.resume is not None else "no checkpoint"
        seen = all_gather_from_store(store, ranks, f"resume, {pause} s", chosen)
        if len(set(seen)) == 1:
            return run
    views = ", ".join(f"rank {seen.index(folder)}: {folder}" for folder in sorted(set(seen)))
    raise RunError(f"ranks find different checkpoints to resume from ({views}); restart the run")


def _verify_checkpoint(run: Run, ranks: Ranks, store: Any, beat: Callable[[], None]) -> Run:
    """Return the run, resumed from the newest checkpoint whose checksums are correct."""
    damaged: dict[str, str] = {}
    while run.resume is not None:
        own = _verify_share(run.resume, ranks, beat)
        found = all_gather_from_store(store, ranks, f"verify {run.resume.folder}", own)
        problems = [problem for part in found for problem in part]
        if not problems:
            if ranks.is_first:
                print(f"checksums of {run.resume.folder} are correct", flush=True)
            return run
        damaged[str(run.resume.folder)] = problems[0]
        if ranks.is_first:
            warn(f"damaged checkpoint: {problems[0]}")
        run = resolve_run(run.requested, ranks.world_size, damaged)
    return run


def _verify_share(resume: Resume, ranks: Ranks, beat: Callable[[], None]) -> list[str]:
    """Return the problems found in this rank's share of the files."""
    found = []
    for name in sorted(resume.manifest.files)[ranks.rank :: ranks.world_size]:
        alone = resume.manifest.model_copy(update={"files": {name: resume.manifest.files[name]}})
        found += manifests.file_problems(resume.folder, alone, checksums=True)
        beat()
    return found
