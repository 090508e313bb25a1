"""Profilers of some iterations of a rank: traces of PyTorch's profiler, or the range of nsys.

Fields and meaning are those of Megatron-LM. nsys itself is started by the user around the run:
``nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop ... pretrain_gpt.py``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.memory_history import profile_folder, write_snapshot

GPU_ONLY = ("nvtx_ranges", "record_memory_history")
"""Fields that have no meaning on a CPU."""


def check_profiling(config: Config, device: Device) -> None:
    """Refuse options that the device of the ranks does not have.

    Raises:
        UserError: nsys, NVTX ranges or memory snapshots are requested on a CPU.
    """
    profiling = config.profiling
    if device.is_cuda:
        return
    wrong = [f"--{name.replace('_', '-')}" for name in GPU_ONLY if getattr(profiling, name)]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: the run is on {device.name}, expected GPUs; remove it"
        )
    if profiling.profile and not profiling.use_pytorch_profiler:
        raise UserError(
            f"--profile controls nsys, which profiles GPUs; the run is on {device.name}: add "
            "--use-pytorch-profiler for a trace of PyTorch's profiler"
        )


class StepProfiler:
    """Profile iterations ``profile_step_start`` + 1 to ``profile_step_end``, if on this rank.

    A run that resumes within the range profiles the rest of it.

    Args:
        config: the run's configuration.
        device: the device of this rank.
        rank: rank of this process.
    """

    def __init__(self, config: Config, device: Device, rank: int) -> None:
        self._run, self._config = config, config.profiling
        self._device, self._rank = device, rank
        self._is_on = config.profiling.profile and rank in config.profiling.profile_ranks
        self._trace: Any = None
        self._nsys: ExitStack | None = None

    def before_step(self, iteration: int) -> None:
        """Start a profiler if the next step is the first profiled one, or its warm-up.

        Args:
            iteration: number of completed iterations.
        """
        if not self._is_on or iteration >= self._config.profile_step_end:
            return
        first = self._config.profile_step_start
        if self._config.use_pytorch_profiler:
            # The profiler allocates its buffers in the step before.
            if self._trace is None and iteration >= first - 1:
                self._trace = self._start_trace(max(first, iteration), warmup=iteration < first)
        elif self._nsys is None and iteration >= first:
            self._nsys = ExitStack()
            torch.cuda.profiler.start()
            shapes = self._config.record_shapes
            self._nsys.enter_context(torch.autograd.profiler.emit_nvtx(record_shapes=shapes))

    def after_step(self, iteration: int) -> None:
        """Count a step, and end the profiler after the last profiled one.

        Args:
            iteration: number of completed iterations.
        """
        if self._trace is not None:
            self._trace.step()
        if self._is_running and iteration >= self._config.profile_step_end:
            self.close()

    def close(self) -> None:
        """End a profiler that is running, and write its trace."""
        if not self._is_running:
            return
        if self._trace is not None:
            self._trace.stop()
        if self._nsys is not None:
            self._nsys.close()
            torch.cuda.profiler.stop()
        self._trace = self._nsys = None
        if self._config.record_memory_history:
            write_snapshot(self._run, self._rank)

    @property
    def _is_running(self) -> bool:
        return self._trace is not None or self._nsys is not None

    def _start_trace(self, first: int, warmup: bool) -> Any:
        """Start PyTorch's profiler; ``first`` is the number of iterations before the range."""
        steps = schedule(
            wait=0, warmup=int(warmup), active=self._config.profile_step_end - first, repeat=1
        )
        activities = [ProfilerActivity.CPU]
        if self._device.is_cuda:
            activities.append(ProfilerActivity.CUDA)
        started = profile(
            activities=activities,
            schedule=steps,
            on_trace_ready=self._write_trace,
            record_shapes=self._config.record_shapes,
        )
        started.start()
        return started

    def _write_trace(self, trace: Any) -> None:
        """Write a trace; a full disk must not end the run."""
        folder = profile_folder(self._run)
        assert folder is not None
        path = folder / trace_name(self._rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            warn(f"{path}: the trace was not written: {error}")
        else:
            print(f"profile of rank {self._rank}: {path}", flush=True)


def trace_name(rank: int) -> str:
    """Return the file name of a rank's trace, which TensorBoard's plugin recognizes by its end."""
    return f"rank{rank}.pt.trace.json"
