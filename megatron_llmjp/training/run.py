"""A run on this rank, from opening its folder to its exit code."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import torch

from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.errors import EXIT_DONE, RunError, UserError
from megatron_llmjp.prepare import Run, prepare
from megatron_llmjp.runtime import distributed
from megatron_llmjp.runtime.determinism import be_deterministic
from megatron_llmjp.runtime.device import Device
from megatron_llmjp.runtime.ranks import Ranks
from megatron_llmjp.training import build
from megatron_llmjp.training.bad_numbers import Judge
from megatron_llmjp.training.build import say
from megatron_llmjp.training.evaluate import describe, evaluate
from megatron_llmjp.training.learning_rate import LearningRates
from megatron_llmjp.training.opening import Opened, opened
from megatron_llmjp.training.rollback import Rollback
from megatron_llmjp.training.trainer import NORMS, Trainer
from megatron_llmjp.training.watch import Watch, watched


def train(run: Run, ranks: Ranks, device: Device) -> int:
    """Build a run on this rank and train it, or only validate it.

    Returns:
        The exit code.
    """
    be_deterministic(run.config.training.deterministic_mode)
    if run.config.training.eval_only:
        return validate_only(run, ranks, device)
    with opened(run, ranks) as beginning:
        data = build.open_data(beginning.run, ranks)
        distributed.start(run.config, ranks, device, beginning.store)
        with watched(run.config, ranks, beginning.store) as watch:
            outcome = _train(beginning, data, watch, ranks, device)
            while isinstance(outcome, Rollback):
                beginning = _back(beginning, outcome, ranks)
                data = build.open_data(beginning.run, ranks)
                outcome = _train(beginning, data, watch, ranks, device)
        distributed.stop()
        return outcome


def _train(
    beginning: Opened, data: build.RunData, watch: Watch, ranks: Ranks, device: Device
) -> int | Rollback:
    """Train from the newest checkpoint, or from the start."""
    run = beginning.run
    watch.watchdog.rest()
    sizes = BatchSizes(run.config)
    rates = LearningRates(run.config, run.schedule, sizes, run.train_iters)
    model = build.build(run, device, rates)
    build.introduce(run, model.chunks, ranks, device)
    saver = build.make_saver(run, sizes, beginning.may_publish)
    judge = Judge(run.config.faults, model.counters.get(NORMS, ()))
    at = build.progress(run)
    outcome = Trainer(run, device, sizes, model, data, saver, watch, judge, *at).train()
    watch.watchdog.rest()
    data.indices.close()
    return outcome


def _back(beginning: Opened, rollback: Rollback, ranks: Ranks) -> Opened:
    """The run as of its last checkpoint, without the batches that led to a spike."""
    gc.collect()  # the model that is given up must not lie beside the new one
    torch.cuda.empty_cache()
    left_out = {**beginning.run.past.skipped_iterations, rollback.words: rollback.positions}
    run = prepare(beginning.run.asked, ranks.world_size, left_out=left_out)
    chosen = str(run.resume.folder) if run.resume is not None else ""
    subject = f"rollback {rollback.iteration} {rollback.words}"
    if len(set(distributed.exchange(beginning.store, ranks, subject, chosen))) > 1:
        raise RunError("ranks see different checkpoints to go back to; start the run again")
    return replace(beginning, run=run)


def validate_only(run: Run, ranks: Ranks, device: Device) -> int:
    """Print the losses of a checkpoint on the validation sets; nothing is written.

    Raises:
        UserError: there is nothing to validate, or nothing to validate on.
        RunError: a loss is NaN or Inf.
    """
    if run.resume is None:
        raise UserError("--eval-only validates a checkpoint: give --load, the folder that holds it")
    if not run.validation:
        raise UserError(
            f"--eval-only: {run.config.data.fold_file} names no validation sets (docs/folds.md)"
        )
    validation = build.open_validation(run, ranks)
    distributed.start(run.config, ranks, device)
    chunks = build.load_weights(run, device)
    build.introduce(run, chunks, ranks, device)
    losses = evaluate(chunks, validation, run.config, device)
    say(describe(losses, run.resume.manifest.iteration))
    wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if wrong:
        raise RunError(
            f"the loss on validation set '{wrong[0]}' is {losses[wrong[0]]}: the model of "
            f"{run.resume.folder} holds NaN or Inf, or overflows in this precision"
        )
    distributed.stop()
    return EXIT_DONE
