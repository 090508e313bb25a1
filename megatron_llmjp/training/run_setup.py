"""Setup of a run: save folder, data, model, optimizer, schedule.

The live objects of a run, from its resolved configuration: data, model, optimizer, schedule.

What a run does before its process groups: take its save folder, and look over its checkpoint.
"""

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
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.index_cache import ensure_indices
from megatron_llmjp.data.indices.prefetch import IndexPrefetcher
from megatron_llmjp.errors import RunError, UserError
from megatron_llmjp.filesystem import no_heartbeat, warn
from megatron_llmjp.formatting import format_count
from megatron_llmjp.model.gpt import build_model, choose_kernels
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.process_groups import (
    DEFAULT_RANK_SYNC,
    RankSync,
    all_gather_from_store,
    is_first_rank,
)
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.run import Run, resolve_run
from megatron_llmjp.training.batch_iterator import Labelled
from megatron_llmjp.training.lr_scheduler import LearningRates, RunScheduler
from megatron_llmjp.training.optimizer import (
    apply_configuration,
    half_precision,
    make_optimizer,
    wrap_for_data_parallel,
)
from megatron_llmjp.training.train_step import connect


@dataclass(frozen=True)
class RunData:
    """Samples of all folds and validation sets, and their indices."""

    training: Dataset[Sample]
    validation: dict[str, ValidationDataset]
    indices: IndexPrefetcher


@dataclass(frozen=True)
class Model:
    """What a step works on."""

    chunks: list[Any]
    optimizer: Any
    scheduler: RunScheduler
    counters: dict[str, Any]
    """What the checkpoint had counted, by the counter's name; empty in a new run."""


def open_data(run: Run, ranks: Ranks, beat: Callable[[], None] = no_heartbeat) -> RunData:
    """Open the datasets and make the indices that are needed first; ``beat`` follows each.

    Before process groups exist: an index may take longer than a collective waits.
    """
    epochs = _epochs(run)
    data = FoldDataset(run.schedule, epochs)
    validation = _validation(run, epochs)
    indices = IndexPrefetcher(
        data,
        first_on_machine=ranks.local_rank == 0,
        log=print if ranks.is_first else lambda text: None,
        heartbeat=beat,
    )
    _, done = progress(run)
    held_out = [dataset.index for dataset in validation.values()]
    indices.start(done, BatchSizeSchedule(run.config).at(done), held_out)
    if ranks.local_rank == 0:
        save_facts(run.datasets, run.cache)
    return RunData(Labelled(data), validation, indices)


def open_validation(
    run: Run, ranks: Ranks, beat: Callable[[], None] = no_heartbeat
) -> dict[str, ValidationDataset]:
    """The validation sets alone, with their indices made; ``beat`` follows each."""
    validation = _validation(run, _epochs(run))
    indices = [dataset.index for dataset in validation.values()]
    ensure_indices(indices, thorough=ranks.local_rank == 0, done=beat)
    return validation


def _epochs(run: Run) -> EpochDatasets:
    vocab_size = max(run.tokenizer.vocab_size, run.config.model.vocab_size or 0)
    return EpochDatasets(run.config.data, run.tokenizer, run.cache, vocab_size)


def _validation(run: Run, epochs: EpochDatasets) -> dict[str, ValidationDataset]:
    return {name: ValidationDataset(held_out, epochs) for name, held_out in run.validation.items()}


def progress(run: Run) -> tuple[int, int]:
    """Iterations done and samples trained on where the run begins."""
    if run.resume is None or run.config.checkpoint.finetune:
        return 0, 0
    return run.resume.manifest.iteration, run.resume.manifest.consumed_samples


def build(
    run: Run, device: Device, rates: LearningRates, work: RankSync = DEFAULT_RANK_SYNC
) -> Model:
    """Model, optimizer and learning rate; from a checkpoint where there is one."""
    config = run.config
    chunks = wrap_for_data_parallel(build_model(config, device), config, device)
    if run.resume is not None and config.checkpoint.finetune:
        sharded_state.load_checkpoint(run.resume.folder, RunState(chunks), work)
    optimizer = make_optimizer(chunks, config, device)
    scheduler = RunScheduler(optimizer, rates)
    connect(chunks, optimizer, config)
    counters: dict[str, Any] = {}
    if run.resume is not None and not config.checkpoint.finetune:
        counters = sharded_state.load_checkpoint(
            run.resume.folder, RunState(chunks, optimizer, scheduler), work
        )
        apply_configuration(optimizer, scheduler, config)
    return Model(chunks, optimizer, scheduler, counters)


def make_saver(
    run: Run,
    sizes: BatchSizeSchedule,
    may_publish: Callable[[], None],
    work: RankSync = DEFAULT_RANK_SYNC,
) -> Saver:
    """Saves the run's checkpoints; ``may_publish`` raises when the save folder is lost."""
    schedule = run.schedule
    samples = tuple(schedule.sample_range(fold)[1] for fold in schedule.folds)
    iterations = frozenset(sizes.iteration_of(end - 1) for end in samples if end > 0)
    about = RunDescription(run.config, _tokenizer_files(run))
    return Saver(about, FoldEnds(samples, iterations), may_publish, progress(run)[0], work)


def _tokenizer_files(run: Run) -> dict[str, bytes]:
    """The tokenizer's files, and what the loaded checkpoint stores next to them, by name."""
    paths = run.tokenizer.files()
    if run.resume is not None:
        generation = run.resume.folder / manifests.GENERATION
        if generation.is_file():
            paths = {**paths, generation.name: generation}
    return {name: path.read_bytes() for name, path in paths.items()}


def load_weights(run: Run, device: Device, work: RankSync = DEFAULT_RANK_SYNC) -> list[Any]:
    """The model alone, from the checkpoint that the run starts from."""
    assert run.resume is not None
    chunks = half_precision(build_model(run.config, device), run.config)
    sharded_state.load_checkpoint(run.resume.folder, RunState(chunks), work)
    return chunks


def introduce(run: Run, chunks: list[Any], ranks: Ranks, device: Device) -> None:
    """Tell what runs where; all ranks call it, so that none is ahead of what is told."""
    parallel = run.config.parallel
    replicas = ranks.world_size // parallel.model_parallel_size
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    tokens = run.schedule.total_samples * run.schedule.sequence_length
    sizes = BatchSizeSchedule(run.config).sizes()
    growing = f"{sizes[0]} growing to " if len(sizes) > 1 else ""
    say(
        f"{ranks.world_size} process(es) by {ranks.started_by} on {device.name}: "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x DP {replicas}\n"
        f"layers: {choose_kernels(device)}; {format_count(parameters)} parameters on the first "
        "rank\n"
        f"data: {len(run.schedule.folds)} folds, {format_count(tokens)} tokens, "
        f"{run.train_iters} iterations of {growing}{sizes[-1]} samples"
    )
    for note in (*run.notes, *slow_precision(run.config, device)):
        say(f"note: {note}")
    if run.resume is not None:
        how = "weights of" if run.config.checkpoint.finetune else "going on from"
        say(f"{how} {run.resume.folder}")
    dist.barrier()


def slow_precision(config: Config, device: Device) -> list[str]:
    """A note on half precision where it is slower than fp32: on a CPU."""
    kind = "bf16" if config.training.bf16 else "fp16" if config.training.fp16 else None
    if kind is None or device.is_cuda:
        return []
    return [
        f"{kind} is slower than fp32 on a CPU: give --no-{kind} (a checkpoint can be resumed in "
        "either)"
    ]


def say(text: str) -> None:
    """Print on the first rank."""
    if is_first_rank():
        print(text, flush=True)


LOOKS = (0, 1, 5, 20)
"""Seconds before each look, while ranks find different checkpoints."""


@dataclass(frozen=True)
class Opened:
    """A run that may begin."""

    run: Run
    may_publish: Callable[[], None]
    """Raises when another run has taken the save folder."""


@contextmanager
def opened(run: Run, ranks: Ranks, store: Any, beat: Callable[[], None]) -> Iterator[Opened]:
    """Hold the run's save folder, with a checkpoint to go on from whose checksums are right.

    Checksums are compared when ``verify_checkpoint`` asks for it, or when the last run in the save
    folder ended without closing: each rank reads a share of the files. A damaged checkpoint is
    passed over for the one before.

    Args:
        run: the run as it was prepared.
        ranks: this process's place.
        store: shared by all ranks.
        beat: called after each file that was read.

    Raises:
        UserError: another run holds the folder, or no checkpoint is whole.
        RunError: the file system of the folder does not answer.
    """
    with ExitStack() as stack:
        lock, was_killed = _take_folder(run, ranks, store, stack)
        run = _with_one_checkpoint(run, ranks, store)
        if was_killed or run.config.checkpoint.verify_checkpoint:
            run = _with_good_checkpoint(run, ranks, store, beat)
        yield Opened(run, lock.check if lock is not None else _always)


def _always() -> None:
    """Other ranks than the first publish nothing."""


def _take_folder(
    run: Run, ranks: Ranks, store: Any, stack: ExitStack
) -> tuple[RunLock | None, bool]:
    """The lock on the first rank; and, for all, whether the last run was killed."""
    save = run.config.checkpoint.save
    if save is None or run.config.training.eval_only:
        return None, False
    lock, answer = None, {"mistake": "", "failure": "", "was_killed": False}
    if ranks.is_first:
        try:
            lock = stack.enter_context(locks.lock_save_folder(Path(save), warn))
            answer["was_killed"] = lock.left_by is not None
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


def _with_one_checkpoint(run: Run, ranks: Ranks, store: Any) -> Run:
    """The run, going on from the same checkpoint on all ranks.

    Some may have looked before the last run in the folder published its last one, some after; or
    their machines' views of a network file system differ for a while.

    Raises:
        RunError: their views stay different.
    """
    for pause in LOOKS:
        if pause:
            time.sleep(pause)
            run = resolve_run(run.requested, ranks.world_size)
        chosen = str(run.resume.folder) if run.resume is not None else "no checkpoint"
        seen = all_gather_from_store(store, ranks, f"resume, {pause} s", chosen)
        if len(set(seen)) == 1:
            return run
    views = ", ".join(f"rank {seen.index(folder)}: {folder}" for folder in sorted(set(seen)))
    raise RunError(
        f"ranks find different checkpoints to resume from ({views}); start the run again"
    )


def _with_good_checkpoint(run: Run, ranks: Ranks, store: Any, beat: Callable[[], None]) -> Run:
    """The run, going on from the newest checkpoint whose checksums are right."""
    damaged: dict[str, str] = {}
    while run.resume is not None:
        own = _problems(run.resume, ranks, beat)
        found = all_gather_from_store(store, ranks, f"verify {run.resume.folder}", own)
        problems = [problem for part in found for problem in part]
        if not problems:
            if ranks.is_first:
                print(f"checksums of {run.resume.folder} are right", flush=True)
            return run
        damaged[str(run.resume.folder)] = problems[0]
        if ranks.is_first:
            warn(f"damaged checkpoint: {problems[0]}")
        run = resolve_run(run.requested, ranks.world_size, damaged)
    return run


def _problems(resume: Resume, ranks: Ranks, beat: Callable[[], None]) -> list[str]:
    """What is wrong with this rank's share of the files."""
    found = []
    for name in sorted(resume.manifest.files)[ranks.rank :: ranks.world_size]:
        alone = resume.manifest.model_copy(update={"files": {name: resume.manifest.files[name]}})
        found += manifests.file_problems(resume.folder, alone, checksums=True)
        beat()
    return found
