"""What a person should know of a step with bad numbers: where it was, and what was in it."""

from __future__ import annotations

from megatron_llmjp.data.epoch_index import Epochs
from megatron_llmjp.data.lineage import Lineage
from megatron_llmjp.prepare import Run
from megatron_llmjp.training.bad_numbers import Judge, Verdict

SHOWN = 10
"""Documents that are named; ``inspect_dataset --run`` shows all."""


def describe_step(run: Run, judge: Judge, iteration: int, batch: range, grad_norm: float) -> str:
    """One line on a step: what was wrong, what was done, and the documents of its batch.

    Args:
        run: the run.
        judge: with its verdict.
        iteration: the step's.
        batch: numbers of the trained samples.
        grad_norm: before clipping.
    """
    fold = run.schedule.fold_at(batch[-1]).name
    norm = f"gradient norm {grad_norm:.3g}, usually {judge.usual:.3g}"
    return (
        f"iteration {iteration}, fold '{fold}': {judge.verdict.value} ({norm}); "
        f"{_consequence(run, judge)}. Documents: {_documents(run, batch)}"
    )


def _consequence(run: Run, judge: Judge) -> str:
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
