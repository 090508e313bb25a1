"""A run on this rank, from opening its folder to its exit code."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.errors import EXIT_DONE, RunError
from megatron_llmjp.parallel import process_groups
from megatron_llmjp.parallel.device import Device, use_deterministic_kernels
from megatron_llmjp.parallel.process_groups import RankSync, new_group_without_timeout
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.parallel.signals import StopRequests
from megatron_llmjp.run import Run, resolve_run
from megatron_llmjp.training import run_setup
from megatron_llmjp.training.evaluation import describe, evaluate
from megatron_llmjp.training.gradient_monitor import Judge, Rollback
from megatron_llmjp.training.lr_scheduler import LearningRates
from megatron_llmjp.training.run_setup import Opened, opened, say
from megatron_llmjp.training.stop_signals import Guard
from megatron_llmjp.training.trainer import NORMS, Trainer
from megatron_llmjp.training.watchdog import Watch, Watchdog, watched


@dataclass(frozen=True)
class _Place:
    """Where a run is trained, as this rank sees it."""

    ranks: Ranks
    device: Device
    store: Any
    """Shared by all ranks."""
    watchdog: Watchdog


def train(run: Run, ranks: Ranks, device: Device, requests: StopRequests | None = None) -> int:
    """Build a run on this rank and train it, or only validate it.

    Args:
        run: what is trained.
        ranks: this process's place.
        device: what this rank computes on.
        requests: to stop; none are taken without.

    Returns:
        The exit code.
    """
    use_deterministic_kernels(run.config.training.deterministic_mode)
    store = process_groups.rendezvous(ranks)
    with watched(run.config, ranks, store) as watchdog:
        place = _Place(ranks, device, store, watchdog)
        if run.config.training.eval_only:
            return _validate_only(run, place)
        watchdog.begin(0, "opening the save folder and its checkpoint", counts_work=True)
        with opened(run, ranks, store, watchdog.beat) as beginning:
            data = _open_data(beginning.run, place)
            work = _join(beginning.run, place)
            guard = Guard(
                run.config.checkpoint.save, requests or StopRequests(), ranks.is_first, work.group
            )
            watch = Watch(guard, watchdog, work)
            outcome = _train(beginning, data, watch, place)
            while isinstance(outcome, Rollback):
                guard.rest()
                beginning = _back(beginning, outcome, place)
                data = _open_data(beginning.run, place)
                work.barrier()
                outcome = _train(beginning, data, watch, place)
            guard.close()
            process_groups.destroy()
            return outcome


def _open_data(run: Run, place: _Place) -> run_setup.RunData:
    """The datasets, with the indices that are needed first."""
    place.watchdog.begin(run_setup.progress(run)[0], "building sample indices", counts_work=True)
    return run_setup.open_data(run, place.ranks, place.watchdog.beat)


def _join(run: Run, place: _Place) -> RankSync:
    """Build the process groups, once all ranks are ready: making indices may take one longer."""
    place.watchdog.begin(run_setup.progress(run)[0], "joining the process groups", counts_work=True)
    process_groups.all_gather_from_store(place.store, place.ranks, "ready", None)
    process_groups.initialize(run.config, place.ranks, place.device, place.store)
    return RankSync(place.watchdog.beat, new_group_without_timeout())


def _train(
    beginning: Opened, data: run_setup.RunData, watch: Watch, place: _Place
) -> int | Rollback:
    """Train from the newest checkpoint, or from the start."""
    run, at = beginning.run, run_setup.progress(beginning.run)
    watch.watchdog.begin(at[0], "building or loading the model", counts_work=True)
    sizes = BatchSizeSchedule(run.config)
    rates = LearningRates(run.config, run.schedule, sizes, run.train_iters)
    model = run_setup.build(run, place.device, rates, watch.work)
    run_setup.introduce(run, model.chunks, place.ranks, place.device)
    saver = run_setup.make_saver(run, sizes, beginning.may_publish, watch.work)
    judge = Judge(run.config.faults, model.counters.get(NORMS, ()))
    watch.guard.watch()
    trainer = Trainer(run, place.device, sizes, model, data, saver, watch, judge, *at)
    outcome = trainer.train()
    watch.watchdog.begin(trainer.iteration, "the end of the run")
    data.indices.close()
    return outcome


def _back(beginning: Opened, rollback: Rollback, place: _Place) -> Opened:
    """The run as of its last checkpoint, without the batches that led to a spike."""
    gc.collect()  # the model that is given up must not lie beside the new one
    torch.cuda.empty_cache()
    left_out = {**beginning.run.history.skipped_iterations, rollback.words: rollback.positions}
    run = resolve_run(beginning.run.requested, place.ranks.world_size, skipped_ranges=left_out)
    chosen = str(run.resume.folder) if run.resume is not None else ""
    subject = f"rollback {rollback.iteration} {rollback.words}"
    if (
        len(set(process_groups.all_gather_from_store(place.store, place.ranks, subject, chosen)))
        > 1
    ):
        raise RunError("ranks see different checkpoints to go back to; start the run again")
    return replace(beginning, run=run)


def _validate_only(run: Run, place: _Place) -> int:
    """Print the losses of a checkpoint on the validation sets; nothing is written.

    Raises:
        RunError: a loss is NaN or Inf.
    """
    assert run.resume is not None
    beat = place.watchdog.beat
    place.watchdog.begin(0, "building sample indices", counts_work=True)
    validation = run_setup.open_validation(run, place.ranks, beat)
    work = _join(run, place)
    iteration = run.resume.manifest.iteration
    place.watchdog.begin(iteration, "loading the model", counts_work=True)
    chunks = run_setup.load_weights(run, place.device, work)
    run_setup.introduce(run, chunks, place.ranks, place.device)
    place.watchdog.begin(iteration, "a validation")
    losses = evaluate(chunks, validation, run.config, place.device, beat=beat)
    say(describe(losses, iteration))
    wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if wrong:
        raise RunError(
            f"the loss on validation set '{wrong[0]}' is {losses[wrong[0]]}: the model of "
            f"{run.resume.folder} holds NaN or Inf, or overflows in this precision"
        )
    process_groups.destroy()
    return EXIT_DONE
