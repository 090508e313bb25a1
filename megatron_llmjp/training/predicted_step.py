"""Step time that the estimate predicts for the GPUs of a run, logged next to the measured one."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.speed.measured_runs import predict_step
from megatron_llmjp.interval_stats import PredictedStep


class StepPredictor:
    """Predicts the step time by batch size.

    Args:
        config: the run's configuration.
        device_name: name of the device of the first rank.
        hosts: host of each rank.
    """

    def __init__(self, config: Config, device_name: str, hosts: Sequence[str]) -> None:
        self._config = config
        self._machine = PlannedMachine(
            len(hosts), device_name, gpus_per_node=list(hosts).count(hosts[0])
        )
        self._known: dict[int, PredictedStep | None] = {}

    def __call__(self, batch_size: int) -> PredictedStep | None:
        """Return the predicted times of a step; None for a CPU or an unknown GPU."""
        if batch_size not in self._known:
            self._known[batch_size] = self._predict(batch_size)
        return self._known[batch_size]

    def _predict(self, batch_size: int) -> PredictedStep | None:
        try:
            config = replace_fields(self._config, global_batch_size=batch_size)
            time = predict_step(config, self._machine)
        except UserError:
            return None
        return PredictedStep(time.total, time.computing)
