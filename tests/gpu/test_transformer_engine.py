"""Transformer Engine on the fake GPU machine: it is chosen, and adds no waits for the device.

Its modules are those of the stand-in: this shows what megatron-core and this program do with them,
and nothing about the kernels.
"""

from __future__ import annotations

import pytest

from tests.gpu.allowed_waits import wrong_waits
from tests.gpu.cases import STEPS, cases
from tests.gpu.machine.library import why_missing
from tests.gpu.machine.process import run_on_machine
from tests.gpu.training_run import GPUS_PER_MACHINE, training_run

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

NAMES = ("llama-documents-deterministic", "gpt2-tp2-sp-dropout", "neox-vp2-first")
CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", NAMES)
def test_run(name: str):
    case = CASES[name]
    call = (case.config.model_dump(mode="json"), case.rank, case.world_size)
    found = run_on_machine(training_run, *call, stand_ins=True)
    device = f"cuda:{case.rank % GPUS_PER_MACHINE}"
    assert found["devices"] == ["cpu", device]
    assert found["model_devices"] == found["optimizer_devices"] == [device]
    assert found["weights"] == ["torch.bfloat16"]
    assert found["main_grads"] == found["optimizer"] == ["torch.float32"]
    assert found["applied"] == [True] * STEPS
    assert found["layers"].startswith("Transformer Engine")
    assert found["attention"] == []  # Transformer Engine's
    assert not wrong_waits(case, found["waits"])
