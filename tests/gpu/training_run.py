"""A run of two steps on one rank of the fake machine, by the product's own trainer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.data import Dataset

from megatron_llmjp.checkpoint.host_copy import HostBuffers
from megatron_llmjp.checkpoint.retention import SaveKind
from megatron_llmjp.checkpoint.sharded_state import (
    RunState,
    get_random_state,
    set_random_state,
    sharded_state_dict,
)
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.documents import DOCUMENT_STARTS
from megatron_llmjp.data.folds.schedule import DatasetSlice, FoldPlan, Schedule
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.model.kernels import choose_kernels
from megatron_llmjp.parallel import process_groups
from megatron_llmjp.parallel.device import Device, setup_rank, use_deterministic_kernels
from megatron_llmjp.parallel.process_groups import RankSync, new_group_without_timeout
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.parallel.signals import StopRequests
from megatron_llmjp.training.garbage_collection import GarbageCollector
from megatron_llmjp.training.gradient_monitor import GradientMonitor
from megatron_llmjp.training.instruments import install_instruments
from megatron_llmjp.training.optimizer import LearningRateSchedule
from megatron_llmjp.training.run_setup import RunDatasets, setup_model_and_optimizer
from megatron_llmjp.training.stop_signals import StopCoordinator
from megatron_llmjp.training.trainer import Trainer
from megatron_llmjp.training.watchdog import RunControl
from tests.gpu.cases import STEPS
from tests.gpu.machine.rank import Machine

DATASETS = ("ja", "en")
GPUS_PER_MACHINE = 8
GRADIENT_NORM = "get_grad_norm_fp32"
"""megatron-core's function that reads the norm."""


_FOLDS = FoldFile.model_validate(
    {"folds": [{"name": "fold", "epochs": 1, "blend": {name: {"path": name} for name in DATASETS}}]}
)


@dataclass
class Report:
    """Facts about a run, as JSON values."""

    waits: dict[str, list[list[Any]]] = field(default_factory=dict)
    """Host waits by phase: operation, place, number of times."""
    devices: list[str] = field(default_factory=list)
    """Devices of all tensors that were computed."""
    backends: list[str] = field(default_factory=list)
    """Backends of the process groups."""
    device_id: str = ""
    """Device that the process groups are bound to."""
    weights: list[str] = field(default_factory=list)
    """Dtypes of the model's weights."""
    main_grads: list[str] = field(default_factory=list)
    """Dtypes of the gradient buffers."""
    optimizer: list[str] = field(default_factory=list)
    """Dtypes of main weights and moments."""
    model_devices: list[str] = field(default_factory=list)
    """Devices of parameters and buffers."""
    optimizer_devices: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    """Device of the losses of each step."""
    saved: list[str] = field(default_factory=list)
    """Devices of the tensors of a save."""
    layers: str = ""
    """Implementations of the layers, as the run prints them."""
    attention: list[str] = field(default_factory=list)
    """Kernels of torch's attention."""
    predicted: float = 0.0
    """Predicted seconds per iteration that a log line has."""
    applied: list[bool] = field(default_factory=list)
    """Whether each step was applied."""


class Phases:
    """Assigns host waits to the phases of a run."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.waits: dict[str, Counter[Any]] = {}
        self._stack = ["between phases"]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._collect()
        self._stack.append(name)
        yield
        self._collect()
        self._stack.pop()

    def _collect(self) -> None:
        taken = self._machine.waits.take()
        self.waits.setdefault(self._stack[-1], Counter()).update(taken)

    def report(self) -> dict[str, list[list[Any]]]:
        self._collect()
        return {
            phase: [[w.operation, w.place, n] for w, n in sorted(waits.items())]
            for phase, waits in self.waits.items()
        }


class Samples(Dataset[dict[str, Tensor]]):
    """Samples of the right shapes and dtypes."""

    def __init__(self, config: Config, size: int) -> None:
        self._config, self._size = config, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self._config.data.seq_length
        numbers = torch.zeros(length, dtype=torch.int64)
        sample = {
            "tokens": numbers,
            "labels": numbers,
            "loss_mask": torch.ones(length),
            "position_ids": numbers,
            "dataset_id": torch.zeros((), dtype=torch.int64),
        }
        if self._config.data.reset_attention_mask:
            sample[DOCUMENT_STARTS] = torch.tensor([0, length // 2], dtype=torch.int32)
        return sample


class _Trainer(Trainer):
    """The product's trainer, with the phases of its loop."""

    phase: Any = None
    report: Any = None

    def _step(self, *args: Any) -> Any:
        answers = self.report.answers
        overflows = self.iteration == 0 and self.run.config.training.fp16
        answers[GRADIENT_NORM] = math.inf if overflows else 2.0
        with self.phase("step"):
            result = super()._step(*args)
        answers[GRADIENT_NORM] = 2.0
        self.report.facts.applied.append(result.updated)
        self.report.facts.losses.append(str(result.sums.device))
        return result

    def _log(self, *args: Any) -> None:
        with self.phase("log"):
            super()._log(*args)

    def _validate(self, *args: Any) -> None:
        with self.phase("evaluation"):
            super()._validate(*args)

    def _save(self, *args: Any) -> None:
        with self.phase("save"):
            super()._save(*args)


class _Saver:
    """Copies the state to host memory as an asynchronous save does, and writes nothing."""

    saved, published_samples, may_remove, is_writing = 0, None, True, False

    def __init__(self, report: Report) -> None:
        self._report = report

    def poll(self) -> None:
        pass

    def due(self, *_: Any) -> SaveKind:
        return SaveKind.NONE

    def close(self, *_: Any) -> None:
        pass

    def hold_update(self) -> None:
        pass

    def save(self, state: RunState, progress: Any) -> None:
        self.saved = progress.iteration
        host, devices = HostBuffers(), set()
        with host.copying():
            for number, tensor in enumerate(_tensors(sharded_state_dict(state, is_loading=False))):
                devices.add(str(tensor.device))
                host.copy((number,), tensor)
        host.hold_device()
        self._report.saved = sorted(devices)


def _tensors(sharded: dict[str, Any]) -> Iterator[Tensor]:
    for value in nested_values(sharded):
        data = value.data if isinstance(value, ShardedTensor) else None
        if isinstance(data, Tensor):
            yield data


def training_run(
    machine: Machine, fields: dict[str, Any], rank: int, world_size: int
) -> dict[str, Any]:
    """Train two steps, validate, and build the state of a save and of a load.

    Args:
        machine: the machine.
        fields: configuration of the run, by section.
        rank: rank of this process.
        world_size: number of ranks.

    Returns:
        The fields of a :class:`Report`.
    """
    config = Config.model_validate(fields)
    report, phase = Report(), Phases(machine)
    machine.waits.answers["agreed"] = 0  # no stop request
    ranks = Ranks(rank, world_size, rank % GPUS_PER_MACHINE, "host", "1", "test")
    with phase("device"):
        use_deterministic_kernels(config.training.deterministic_mode)
        device = setup_rank("auto", ranks.local_rank)
        assert not device.problem
    with phase("process groups"):
        process_groups.initialize(config, ranks, device, torch.distributed.HashStore())
        sync = RankSync(group=new_group_without_timeout())
    trainer = _trainer(config, device, sync, report, phase)
    trainer.phase = phase
    trainer.report = SimpleNamespace(answers=machine.waits.answers, facts=report)
    assert trainer.train() == 0
    with phase("load"):
        state = RunState(trainer.model.chunks, trainer.model.optimizer, trainer.model.scheduler)
        sharded_state_dict(state, is_loading=True)
    with phase("random state"), unset_fake_temporarily():  # generators are real, on the host
        set_random_state(get_random_state())
    process_groups.destroy()
    _describe(report, trainer)
    predicted = trainer.instruments.predictor(config.training.global_batch_size)
    report.predicted = predicted.total if predicted is not None else 0.0
    report.waits = phase.report()
    report.devices = sorted(machine.waits.devices)
    report.backends = sorted(machine.groups.backends)
    report.layers = str(choose_kernels(device, config))
    report.attention = sorted(machine.attention)
    report.device_id = str(machine.groups.device_id)
    return vars(report)


def _trainer(
    config: Config, device: Device, sync: RankSync, report: Report, phase: Callable[[str], Any]
) -> _Trainer:
    sizes = BatchSizeSchedule(config)
    samples = sizes.consumed_after(STEPS)
    schedule = _schedule(config, samples)
    run: Any = SimpleNamespace(
        config=config,
        schedule=schedule,
        train_iters=STEPS,
        resume=None,
        folds=_FOLDS,
        history=SimpleNamespace(skipped_iterations={}, overrides=()),
    )
    rates = LearningRateSchedule(config, schedule, sizes, STEPS)
    with phase("model and optimizer"):
        model = setup_model_and_optimizer(run, device, rates, sync)
    held_out: Any = {"valid": Samples(config, config.training.global_batch_size)}
    indices: Any = SimpleNamespace(ensure_ready=lambda *_: True)
    data = RunDatasets(Samples(config, samples), held_out, indices)
    watchdog: Any = SimpleNamespace(begin=lambda *_: None)
    stop = StopCoordinator(None, StopRequests(), False, sync.group)
    control = RunControl(stop, watchdog, sync)
    saver: Any = _Saver(report)
    monitor = GradientMonitor(config.faults)
    garbage = GarbageCollector(config.training)
    hosts = ["host"] * torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    instruments = install_instruments(config, model.chunks, device, rank, hosts)
    return _Trainer(
        run, device, sizes, model, data, saver, control, monitor, garbage, 0, 0, instruments
    )


def _schedule(config: Config, samples: int) -> Schedule:
    pieces = tuple(DatasetSlice(name, name, name, 0, samples // 2, samples) for name in DATASETS)
    fold = FoldPlan("fold", 0, samples, pieces, "digest")
    return Schedule(1, config.data.seq_length, (fold,))


def _describe(report: Report, trainer: Trainer) -> None:
    chunks, optimizer = trainer.model.chunks, trainer.model.optimizer
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    tensors = [t for chunk in chunks for t in (*chunk.module.parameters(), *chunk.module.buffers())]
    report.model_devices = sorted({str(t.device) for t in tensors})
    report.weights = sorted({str(p.dtype) for p in parameters})
    report.main_grads = sorted({str(p.main_grad.dtype) for p in parameters})
    state = [p for group in optimizer.param_groups for p in group["params"]]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        values = part.optimizer.state.values()
        state += [t for entry in values for t in entry.values() if isinstance(t, Tensor)]
    report.optimizer = sorted({str(t.dtype) for t in state})
    report.optimizer_devices = sorted({str(t.device) for t in state})
