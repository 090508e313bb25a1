"""Two steps, a log line, a validation and a save of every architecture on the fake GPU machine."""

from __future__ import annotations

import pytest

from tests.gpu.allowed_waits import ALLOWED, wrong_waits
from tests.gpu.cases import STEPS, Case, cases
from tests.gpu.machine.library import why_missing
from tests.gpu.machine.process import run_on_machine
from tests.gpu.training_run import GPUS_PER_MACHINE, training_run

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

CASES = cases()


def test_every_allowed_wait_belongs_to_a_case():
    assert not [a for a in ALLOWED if not any(a.when(case) for case in CASES)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run(case: Case):
    config = case.config
    found = run_on_machine(training_run, config.model_dump(mode="json"), case.rank, case.world_size)

    device = f"cuda:{case.rank % GPUS_PER_MACHINE}"
    assert found["devices"] == ["cpu", device]
    assert found["model_devices"] == found["optimizer_devices"] == [device]
    assert found["losses"] == [device] * STEPS
    assert found["saved"] == [device]
    assert found["backends"] == ["gloo", "nccl"]
    assert found["device_id"] == device

    training = config.training
    dtype = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    assert found["weights"] == [f"torch.{dtype}"]
    assert found["main_grads"] == found["optimizer"] == ["torch.float32"]
    assert found["applied"] == [not training.fp16, True]  # the first fp16 step overflows

    assert found["predicted"] > 0.0
    assert found["layers"] == "SDPA attention, torch norms, fusions"
    assert found["attention"] == [case.attention]
    assert not wrong_waits(case, found["waits"])
