"""Every place where the host may wait for the device, by phase of a run, with the reason.

The list is exact: a wait that is not in it fails ``test_training.py``, and so does an entry that no
longer waits, or waits more or less often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.gpu.cases import STEPS, Case


def _always(case: Case) -> bool:
    return True


def _fp16(case: Case) -> bool:
    return case.config.training.fp16


def _has_learned_positions(case: Case) -> bool:
    return case.config.model.position_embedding_type == "learned_absolute" and case.is_first_stage


def _slices_rotary_embedding(case: Case) -> bool:
    model, parallel = case.config.model, case.config.parallel
    return parallel.context_parallel_size > 1 and model.position_embedding_type == "rope"


@dataclass(frozen=True)
class AllowedWait:
    """A place where the host waits."""

    phase: str
    operation: str
    place: str
    times: int | None
    """Number of times in a run; None if it depends on the number of tensors."""
    reason: str
    when: Callable[[Case], bool] = _always


_OPTIMIZER = "megatron/core/optimizer"
_NORM = f"{_OPTIMIZER}/clip_grads.py:get_grad_norm_fp32"
_LOSSES = "megatron_llmjp/training/train_step.py:means_over_ranks"
_TRAINER = "megatron_llmjp/training/trainer.py"

ONCE = (
    ("all_gather_object", f"{_OPTIMIZER}/__init__.py:_get_param_groups", 2, "parameter groups"),
    ("copy cpu to cuda", f"{_OPTIMIZER}/optimizer.py:__init__", None, "constants"),
    ("copy cpu to cuda", f"{_OPTIMIZER}/grad_scaler.py:__init__", 4, "the loss scale", _fp16),
    (
        "copy cpu to cuda",
        "megatron_llmjp/model/gpt.py:build_model_chunk",
        1,
        "megatron-core creates position embeddings on the host",
        _has_learned_positions,
    ),
)
EVERY_STEP = (("item", _NORM, STEPS, "decides whether the step is applied"),)
FIRST_STEP = (
    (
        "copy of pageable memory cpu to cuda",
        "megatron/core/models/common/embeddings/rope_utils.py:get_pos_emb_on_this_cp_rank",
        1,
        "two numbers, once; pinned by torch.tensor, which this machine does not see",
        _slices_rotary_embedding,
    ),
)
OVERFLOW = (
    ("item", f"{_TRAINER}:_step", 1, "the new loss scale", _fp16),
    (
        "item",
        "megatron_llmjp/training/train_step.py:is_finite_on_all_ranks",
        1,
        "a lower loss scale cannot help if the loss itself is NaN or Inf",
        _fp16,
    ),
)
EVERY_LOG_LINE = (
    ("tolist", _LOSSES, STEPS, "the losses"),
    ("item", _NORM, STEPS, "the parameter norm"),
    ("item", f"{_TRAINER}:_log", STEPS, "the loss scale"),
)
EVERY_VALIDATION = (("tolist", _LOSSES, 1, "the losses"),)
ALLOWED = tuple(
    AllowedWait(phase, *entry)  # type: ignore[arg-type]
    for phase, entries in {
        "model and optimizer": ONCE,
        "step": (*EVERY_STEP, *FIRST_STEP, *OVERFLOW),
        "log": EVERY_LOG_LINE,
        "evaluation": EVERY_VALIDATION,
    }.items()
    for entry in entries
)


def wrong_waits(case: Case, found: dict[str, list[tuple[str, str, int]]]) -> list[str]:
    """Compare the waits of a run with the list, and return a line for each difference.

    Args:
        case: the run.
        found: operation, place and number of the waits of each phase.
    """
    seen = {(phase, op, place): n for phase, waits in found.items() for op, place, n in waits}
    allowed = {(a.phase, a.operation, a.place): a.times for a in ALLOWED if a.when(case)}
    wrong = [f"not allowed: {wait}" for wait in seen.keys() - allowed.keys()]
    wrong += [f"allowed, but not found: {wait}" for wait in allowed.keys() - seen.keys()]
    wrong += [
        f"{seen[wait]} times instead of {times}: {wait}"
        for wait, times in allowed.items()
        if wait in seen and times not in (None, seen[wait])
    ]
    return sorted(wrong)
