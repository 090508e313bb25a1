"""What a person should know of a step with bad numbers: where it was, and what was in it."""

from __future__ import annotations

from megatron_llmjp.data.epoch_index import Epochs
from megatron_llmjp.data.lineage import Lineage
from megatron_llmjp.prepare import Run
from megatron_llmjp.training.bad_numbers import HISTORY, Judge, Verdict
from megatron_llmjp.training.rollback import WINDOW

SHOWN = 10
"""Documents that are named; ``inspect_dataset --run`` shows all."""


def describe_step(
    run: Run, judge: Judge, iteration: int, batch: range, grad_norm: float, gives_up: bool
) -> str:
    """One line on a step: what was wrong, what was done, and the documents of its batch.

    Args:
        run: the run.
        judge: with its verdict.
        iteration: the step's.
        batch: numbers of the trained samples.
        grad_norm: before clipping.
        gives_up: whether a limit is reached, which ends the run.
    """
    fold = run.schedule.fold_at(batch[-1]).name
    norm = f"gradient norm {grad_norm:.3g}, usually {judge.usual:.3g}"
    return (
        f"iteration {iteration}, fold '{fold}': {judge.verdict.value} ({norm}); "
        f"{_consequence(run, judge, gives_up)}. Documents: {_documents(run, batch)}"
    )


def describe_end(run: Run, judge: Judge, iteration: int, grad_norm: float, rollbacks: int) -> str:
    """Which limit ended a run, and what to change.

    Args:
        run: the run.
        judge: with its verdict.
        iteration: the last step's.
        grad_norm: the last step's, before clipping.
        rollbacks: how many count against the limit.
    """
    faults = run.config.faults
    if judge.too_many_bad:
        return (
            f"iteration {iteration} was the last of too many bad steps in a row "
            f"(--max-bad-steps {faults.max_bad_steps}). A model that holds NaN or Inf does not "
            "recover; if a restart comes to the same steps, leave their batches out with "
            "--skip-iterations"
        )
    norm = f"the gradient norm is {grad_norm:.3g} where {judge.usual:.3g} was usual"
    if judge.too_many_spikes:
        return (
            f"iteration {iteration} was one of too many skipped spikes (--max-spikes "
            f"{faults.max_spikes} among {HISTORY} steps): {norm}. If this is its new level, as "
            "after a change of the data, restart with --spike-action warn or a higher "
            f"--spike-threshold than {faults.spike_threshold:g}"
        )
    return (
        f"iteration {iteration} is a spike after {rollbacks} rollbacks (--max-rollbacks "
        f"{faults.max_rollbacks} within {WINDOW:,} iterations): {norm}. Restart from an earlier "
        "checkpoint (--load SAVE/iter_...), with a lower learning rate, or, if this is the norm's "
        f"new level, with a higher --spike-threshold than {faults.spike_threshold:g}"
    )


def _consequence(run: Run, judge: Judge, gives_up: bool) -> str:
    if gives_up:
        return "the step is not taken, and the run ends"
    if judge.wants_rollback:
        return "going back to the last checkpoint, leaving out the batches that led here"
    if judge.verdict is Verdict.SPIKE and run.config.faults.spike_action == "warn":
        return "the step is taken (--spike-action skip or rollback would not)"
    return "the step is not taken"


def _documents(run: Run, batch: range) -> str:
    lineage = Lineage(run.schedule, Epochs(run.config.data, run.tokenizer, run.cache))
    found: dict[tuple[str, int], None] = {}
    for number in batch:
        for dataset, document, _, _ in lineage.documents_of(number):
            found[dataset, document] = None
        if len(found) > SHOWN:
            break
    named = [f"{dataset} {document}" for dataset, document in list(found)[:SHOWN]]
    more = "" if len(found) <= SHOWN else f", ... (of {len(batch)} samples)"
    return ", ".join(named) + more
