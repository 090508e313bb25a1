"""The live objects of a run, from its resolved configuration: data, model, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import store
from megatron_llmjp.checkpoint.saver import FoldEnds, Saver
from megatron_llmjp.checkpoint.saving import Description
from megatron_llmjp.checkpoint.store import RunState
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.dataset import FoldDataset, Sample, ValidationDataset
from megatron_llmjp.data.epoch_index import Epochs
from megatron_llmjp.data.facts import remember
from megatron_llmjp.data.index_ahead import IndexAhead
from megatron_llmjp.data.index_cache import ensure_all
from megatron_llmjp.model.gpt import build_model, choose_kernels
from megatron_llmjp.numbers import human
from megatron_llmjp.prepare import Run
from megatron_llmjp.runtime.device import Device
from megatron_llmjp.runtime.distributed import is_first_rank
from megatron_llmjp.runtime.long_work import UNWATCHED, LongWork
from megatron_llmjp.runtime.ranks import Ranks
from megatron_llmjp.system import no_heartbeat
from megatron_llmjp.training.feed import Labelled
from megatron_llmjp.training.learning_rate import LearningRates, RunScheduler
from megatron_llmjp.training.optimizer import (
    apply_configuration,
    half_precision,
    make_optimizer,
    wrap_for_data_parallel,
)
from megatron_llmjp.training.step import connect


@dataclass(frozen=True)
class RunData:
    """Samples of all folds and validation sets, and their indices."""

    training: Dataset[Sample]
    validation: dict[str, ValidationDataset]
    indices: IndexAhead


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
    indices = IndexAhead(
        data,
        first_on_machine=ranks.local_rank == 0,
        say=print if ranks.is_first else lambda text: None,
        beat=beat,
    )
    _, done = progress(run)
    held_out = [dataset.index for dataset in validation.values()]
    indices.start(done, BatchSizes(run.config).at(done), held_out)
    if ranks.local_rank == 0:
        remember(run.datasets, run.cache)
    return RunData(Labelled(data), validation, indices)


def open_validation(
    run: Run, ranks: Ranks, beat: Callable[[], None] = no_heartbeat
) -> dict[str, ValidationDataset]:
    """The validation sets alone, with their indices made; ``beat`` follows each."""
    validation = _validation(run, _epochs(run))
    indices = [dataset.index for dataset in validation.values()]
    ensure_all(indices, thorough=ranks.local_rank == 0, done=beat)
    return validation


def _epochs(run: Run) -> Epochs:
    vocab_size = max(run.tokenizer.vocab_size, run.config.model.vocab_size or 0)
    return Epochs(run.config.data, run.tokenizer, run.cache, vocab_size)


def _validation(run: Run, epochs: Epochs) -> dict[str, ValidationDataset]:
    return {name: ValidationDataset(held_out, epochs) for name, held_out in run.validation.items()}


def progress(run: Run) -> tuple[int, int]:
    """Iterations done and samples trained on where the run begins."""
    if run.resume is None or run.config.checkpoint.finetune:
        return 0, 0
    return run.resume.manifest.iteration, run.resume.manifest.consumed_samples


def build(run: Run, device: Device, rates: LearningRates, work: LongWork = UNWATCHED) -> Model:
    """Model, optimizer and learning rate; from a checkpoint where there is one."""
    config = run.config
    chunks = wrap_for_data_parallel(build_model(config, device), config, device)
    if run.resume is not None and config.checkpoint.finetune:
        store.load(run.resume.folder, RunState(chunks), work)
    optimizer = make_optimizer(chunks, config, device)
    scheduler = RunScheduler(optimizer, rates)
    connect(chunks, optimizer, config)
    counters: dict[str, Any] = {}
    if run.resume is not None and not config.checkpoint.finetune:
        counters = store.load(run.resume.folder, RunState(chunks, optimizer, scheduler), work)
        apply_configuration(optimizer, scheduler, config)
    return Model(chunks, optimizer, scheduler, counters)


def make_saver(
    run: Run, sizes: BatchSizes, may_publish: Callable[[], None], work: LongWork = UNWATCHED
) -> Saver:
    """Saves the run's checkpoints; ``may_publish`` raises when the save folder is lost."""
    schedule = run.schedule
    samples = tuple(schedule.trainable(fold)[1] for fold in schedule.folds)
    iterations = frozenset(sizes.iteration_of(end - 1) for end in samples if end > 0)
    about = Description(run.config, _tokenizer_files(run))
    return Saver(about, FoldEnds(samples, iterations), may_publish, progress(run)[0], work)


def _tokenizer_files(run: Run) -> dict[str, bytes]:
    """The tokenizer's files, and what the loaded checkpoint stores next to them, by name."""
    paths = run.tokenizer.files()
    if run.resume is not None:
        generation = run.resume.folder / manifests.GENERATION
        if generation.is_file():
            paths = {**paths, generation.name: generation}
    return {name: path.read_bytes() for name, path in paths.items()}


def load_weights(run: Run, device: Device, work: LongWork = UNWATCHED) -> list[Any]:
    """The model alone, from the checkpoint that the run starts from."""
    assert run.resume is not None
    chunks = half_precision(build_model(run.config, device), run.config)
    store.load(run.resume.folder, RunState(chunks), work)
    return chunks


def introduce(run: Run, chunks: list[Any], ranks: Ranks, device: Device) -> None:
    """Tell what runs where; all ranks call it, so that none is ahead of what is told."""
    parallel = run.config.parallel
    replicas = ranks.world_size // parallel.model_parallel_size
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    tokens = run.schedule.total_samples * run.schedule.sequence_length
    sizes = BatchSizes(run.config).sizes()
    growing = f"{sizes[0]} growing to " if len(sizes) > 1 else ""
    say(
        f"{ranks.world_size} process(es) by {ranks.started_by} on {device.name}: "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x DP {replicas}\n"
        f"layers: {choose_kernels(device)}; {human(parameters)} parameters on the first rank\n"
        f"data: {len(run.schedule.folds)} folds, {human(tokens)} tokens, "
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
