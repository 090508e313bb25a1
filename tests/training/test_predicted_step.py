"""The step time that a run logs next to the measured one."""

from __future__ import annotations

import pytest

from megatron_llmjp.config.loading import preset_names
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.estimate.run_estimate import estimate_run
from megatron_llmjp.training.predicted_step import StepPredictor
from tests.estimate.test_flops import preset

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("name", preset_names())
def test_predictions_are_those_of_the_estimate(name):
    """On nodes of eight GPUs, for the batch size of the moment."""
    config = preset(name, vocab_size=50_000)
    size = config.parallel.model_parallel_size * config.parallel.expert_model_parallel_size
    world_size = size * max(1, 8 // size)
    hosts = [f"n{rank // 8}" for rank in range(world_size)]
    predict = StepPredictor(config, H100, hosts)
    batch = config.training.micro_batch_size * world_size // config.parallel.model_parallel_size
    for number in (batch, 3 * batch):
        expected = estimate_run(
            preset(name, vocab_size=50_000, global_batch_size=number),
            PlannedMachine(world_size, "H100", gpus_per_node=min(8, world_size)),
        )
        found = predict(number)
        assert found is not None
        assert (found.total, found.computing) == (
            expected.step_seconds,
            expected.step_time.computing,
        )
    assert predict(batch + 1) is None or batch == 1  # not a multiple of the micro-batches


def test_no_prediction_on_other_devices():
    config = preset("laptop-llama", vocab_size=4096)
    for device in ("CPU, 1 thread(s) per rank", "Unknown GPU 1"):
        assert StepPredictor(config, device, ["n0"])(16) is None
