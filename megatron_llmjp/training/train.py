"""Training and validation of a run on one rank, from the save folder's lock to the exit code."""

from __future__ import annotations

import faulthandler
import gc
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_llmjp.checkpoint.save_clock import SaveClock
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.errors import EXIT_DONE, RunError
from megatron_llmjp.parallel import process_groups, rendezvous
from megatron_llmjp.parallel.device import Device, use_deterministic_kernels
from megatron_llmjp.parallel.device_agreement import (
    bind_to_local_cpus,
    check_devices,
    describe_devices,
)
from megatron_llmjp.parallel.process_groups import RankSync, new_group_without_timeout
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.parallel.signals import StopRequests
from megatron_llmjp.run import Run, resolve_run
from megatron_llmjp.training import run_setup
from megatron_llmjp.training.evaluation import evaluate
from megatron_llmjp.training.garbage_collection import GarbageCollector
from megatron_llmjp.training.gradient_monitor import GradientMonitor, Rollback
from megatron_llmjp.training.instruments import install_instruments
from megatron_llmjp.training.log_lines import LogLines, choose_format
from megatron_llmjp.training.memory_history import profile_folder, record_memory_history
from megatron_llmjp.training.optimizer import LearningRateSchedule
from megatron_llmjp.training.out_of_memory import explain_out_of_memory
from megatron_llmjp.training.profiling import check_profiling
from megatron_llmjp.training.run_setup import LockedRun, locked_run, print_rank_0
from megatron_llmjp.training.stop_signals import StopCoordinator
from megatron_llmjp.training.trainer import GRADIENT_NORMS_STATE, Trainer
from megatron_llmjp.training.watchdog import RunControl, Watchdog, hang_detection


@dataclass(frozen=True)
class _RankContext:
    """Objects of this rank that outlive a rollback."""

    ranks: Ranks
    device: Device
    store: Any
    """Key-value store shared by all ranks."""
    watchdog: Watchdog
    hosts: list[str]
    """Host of each rank."""
    hardware: str
    """Devices of all ranks, for the record of the run."""


def train(run: Run, ranks: Ranks, device: Device, requests: StopRequests | None = None) -> int:
    """Train a run on this rank, or validate it with ``eval_only``.

    Args:
        run: the resolved run.
        ranks: rank and world size of this process.
        device: the device of this rank.
        requests: stop requests that this process receives; None to ignore signals.

    Returns:
        The exit code.
    """
    faulthandler.enable(2)  # a crash in native code prints the Python stacks of this rank
    use_deterministic_kernels(run.config.training.deterministic_mode)
    store = rendezvous.rendezvous(ranks)
    with hang_detection(run.config, ranks, store, device.is_cuda) as watchdog:
        devices = check_devices(store, ranks, device)
        hosts = [other.host for other in devices]
        watchdog.know_hosts(hosts)
        bind_to_local_cpus(devices, ranks)
        check_profiling(run.config, device)
        record_memory_history(run.config, ranks.rank)
        context = _RankContext(ranks, device, store, watchdog, hosts, describe_devices(devices))
        if run.config.training.eval_only:
            return _validate_only(run, context)
        watchdog.begin(0, "opening the save folder and its checkpoint", counts_work=True)
        with locked_run(run, ranks, store, watchdog.beat) as locked:
            data = _open_datasets(locked.run, context)
            sync = _start_process_groups(locked.run, context)
            settings, requests = run.config.checkpoint, requests or StopRequests()
            clock = SaveClock(settings)
            stop = StopCoordinator(settings.save, requests, ranks.is_first, sync.group, clock)
            control = RunControl(stop, watchdog, sync)
            outcome = _train(locked, data, control, context)
            while isinstance(outcome, Rollback):
                stop.end_on_signal()
                locked = _prepare_rollback(locked, outcome, context)
                data = _open_datasets(locked.run, context)
                sync.barrier()
                outcome = _train(locked, data, control, context)
            stop.close()
            process_groups.destroy()
            return outcome


def _open_datasets(run: Run, context: _RankContext) -> run_setup.RunDatasets:
    """Open the datasets and build the sample indices that are needed first."""
    context.watchdog.begin(
        run_setup.initial_progress(run)[0], "building sample indices", counts_work=True
    )
    return run_setup.open_datasets(run, context.ranks, context.watchdog.beat)


def _start_process_groups(run: Run, context: _RankContext) -> RankSync:
    """Initialize the process groups once all ranks have finished their setup so far."""
    context.watchdog.begin(
        run_setup.initial_progress(run)[0], "joining the process groups", counts_work=True
    )
    rendezvous.all_gather_from_store(context.store, context.ranks, "ready", None)
    process_groups.initialize(run.config, context.ranks, context.device, context.store)
    return RankSync(context.watchdog.beat, new_group_without_timeout())


def _train(
    locked: LockedRun, data: run_setup.RunDatasets, control: RunControl, context: _RankContext
) -> int | Rollback:
    """Train from the checkpoint to resume, or from the start."""
    run, start = locked.run, run_setup.initial_progress(locked.run)
    control.watchdog.begin(start[0], "building or loading the model", counts_work=True)
    sizes = BatchSizeSchedule(run.config)
    rates = LearningRateSchedule(run.config, run.schedule, sizes, run.train_iters)
    rank, folder = context.ranks.rank, profile_folder(run.config)
    with explain_out_of_memory((), None, context.device, rank, folder):
        model = run_setup.setup_model_and_optimizer(run, context.device, rates, control.sync)
    run_setup.print_run_summary(run, model.chunks, context.ranks, context.device)
    saver = run_setup.build_saver(run, sizes, locked.check_lock, control.sync)
    monitor = GradientMonitor(run.config.faults, model.counters.get(GRADIENT_NORMS_STATE, ()))
    control.stop.defer_signals()
    control.stop.restart_save_clock()
    garbage = GarbageCollector(run.config.training)
    instruments = install_instruments(run.config, model.chunks, context.device, rank, context.hosts)
    trainer = Trainer(
        run,
        context.device,
        sizes,
        model,
        data,
        saver,
        control,
        monitor,
        garbage,
        *start,
        instruments,
        context.hardware,
    )
    with explain_out_of_memory(model.chunks, model.optimizer, context.device, rank, folder):
        outcome = trainer.train()
    control.watchdog.begin(trainer.iteration, "the end of the run")
    data.indices.close()
    return outcome


def _prepare_rollback(locked: LockedRun, rollback: Rollback, context: _RankContext) -> LockedRun:
    """Return the run as of its last checkpoint, with the batches of the spike skipped."""
    gc.collect()  # free the old model before the new one is built
    torch.cuda.empty_cache()
    skipped = {**locked.run.history.skipped_iterations, rollback.key: rollback.positions}
    run = resolve_run(locked.run.requested, context.ranks.world_size, skipped_ranges=skipped)
    chosen = str(run.resume.folder) if run.resume is not None else ""
    subject = f"rollback {rollback.iteration} {rollback.key}"
    folders = rendezvous.all_gather_from_store(context.store, context.ranks, subject, chosen)
    if len(set(folders)) > 1:
        raise RunError("ranks find different checkpoints to roll back to; restart the run")
    return replace(locked, run=run)


def _validate_only(run: Run, context: _RankContext) -> int:
    """Print the losses of a checkpoint on the validation sets; write nothing.

    Raises:
        RunError: a loss is NaN or Inf.
    """
    assert run.resume is not None
    beat = context.watchdog.beat
    context.watchdog.begin(0, "building sample indices", counts_work=True)
    validation = run_setup.open_validation_sets(run, context.ranks, beat)
    sync = _start_process_groups(run, context)
    iteration = run.resume.manifest.iteration
    context.watchdog.begin(iteration, "loading the model", counts_work=True)
    chunks = run_setup.load_weights(run, context.device, sync)
    run_setup.print_run_summary(run, chunks, context.ranks, context.device)
    context.watchdog.begin(iteration, "a validation")
    losses = evaluate(chunks, validation, run.config, context.device, beat=beat)
    lines = LogLines(choose_format(run.config.logging.log_format), run.train_iters)
    print_rank_0(lines.validation(iteration, losses))
    wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if wrong:
        raise RunError(
            f"the loss on validation set '{wrong[0]}' is {losses[wrong[0]]}: the model in "
            f"{run.resume.folder} contains NaN or Inf, or overflows in this precision"
        )
    process_groups.destroy()
    return EXIT_DONE
