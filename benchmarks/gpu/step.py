"""Parts ``step-*``: speed, memory, host waits and kernels of a training step on one GPU."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import runs
from benchmarks.gpu.results import NEEDS_GPU, Context, SkippedError
from benchmarks.gpu.session import Session, synchronize
from benchmarks.gpu.trace import KERNELS_SHOWN, read_trace, summarize
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.estimate.flops import tflops_per_device
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.memory import rank_memory
from megatron_llmjp.estimate.speed.gpus import peak_tflops
from megatron_llmjp.formatting import format_count

WARM_UP = 2
"""Steps before the first measurement: they compile, and allocate memory."""

PROFILED_STEPS = 2

OUT_OF_MEMORY = "out of memory"

GPU_SIZES = {"fits 80 GB": 80e9, "fits 141 GB": 141e9}


def measure(context: Context, preset: str, layers: str = "torch") -> None:
    """Measure the first micro-batch size, profile it, then measure the other sizes.

    Raises:
        SkippedError: Transformer Engine is requested and not installed.
    """
    if layers not in runs.installed_layers(context):
        raise SkippedError("Transformer Engine is not installed, or there is no GPU")
    session = Session(context, preset, layers)
    results, config = context.results, session.config
    results.note(
        f"{format_count(session.parameters)} parameters, {config.data.seq_length} tokens per "
        f"sample, {config.training.global_batch_size} samples per step, bf16 with fp32 main "
        f"weights and gradients; modules: {session.layer_classes}"
    )
    first, *others = context.scale.micro_batch_sizes
    results.add("speed and memory", _speed(context, session, first))
    if context.is_cuda:
        _profile(context, session)
        _call_sites(context, session)
    else:
        results.add("host waits", {"call": "all", "per step": NEEDS_GPU})
        results.add(f"{KERNELS_SHOWN} longest kernels", {"kernel": "all", "per step": NEEDS_GPU})
    for size in others:
        row = _speed(context, session, size)
        results.add("speed and memory", row)
        if OUT_OF_MEMORY in str(row["s per step"]):
            break  # the sizes grow
    session.close()


def _speed(context: Context, session: Session, size: int) -> dict[str, Any]:
    """Return the row of a micro-batch size; out of memory is a result, too."""
    scale = context.scale
    is_first = size == scale.micro_batch_sizes[0]
    steps = scale.measured_steps if is_first else max(1, scale.measured_steps // 3)
    predicted = predicted_bytes(session, size)
    row: dict[str, Any] = {"micro-batch size": size}
    try:
        session.use_micro_batch_size(size)
        for _ in range(WARM_UP if is_first else 1):
            session.step()
        row |= _timed(context, session, steps)
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        row["s per step"] = f"{OUT_OF_MEMORY}: {error}"[:80]
    row["predicted GB"] = predicted / 1e9
    if context.is_cuda:
        row |= _fits(row)
        gc.collect()
        torch.cuda.empty_cache()
    return row


def _timed(context: Context, session: Session, steps: int) -> dict[str, Any]:
    synchronize(context)
    if context.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        session.step()
    synchronize(context)
    seconds = (time.perf_counter() - start) / steps
    row: dict[str, Any] = {"s per step": seconds, "tokens/s": session.tokens_per_step / seconds}
    row["TFLOP/s"] = _tflops(session, seconds)
    row["MFU"] = mfu(session, seconds)
    row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if context.is_cuda else NEEDS_GPU
    return row


def _tflops(session: Session, seconds: float) -> float:
    samples = session.config.training.global_batch_size
    return tflops_per_device(session.config, samples, seconds, 1)


def mfu(session: Session, seconds: float) -> str:
    """Return the utilization of the GPU's bf16 peak by a step of some seconds."""
    peak = peak_tflops(session.device.name, "bf16")
    return f"{_tflops(session, seconds) / peak:.1%}" if peak else NEEDS_GPU


def predicted_bytes(session: Session, size: int) -> int:
    """Return the peak that ``--estimate`` predicts, without CUDA's own memory."""
    config = replace_fields(session.config, micro_batch_size=size)
    return rank_memory(config, make_layout(config, 1), 0).total


def _fits(row: dict[str, Any]) -> dict[str, str]:
    """Return which GPUs the measured peak fits, with the memory that CUDA itself uses."""
    if not isinstance(row.get("peak GB"), float):
        return {}
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    needed = row["peak GB"] * 1e9 + own
    return {name: "yes" if needed <= memory else "no" for name, memory in GPU_SIZES.items()}


def _profile(context: Context, session: Session) -> None:
    """Add the host waits and the longest kernels of two steps, from torch's profiler."""
    trace = context.results.path.with_suffix(".trace.json")
    session.use_micro_batch_size(context.scale.micro_batch_sizes[0])
    session.step()
    synchronize(context)
    with torch.profiler.profile(activities=_activities()) as profiler:
        for _ in range(PROFILED_STEPS):
            session.step()
        synchronize(context)
    profiler.export_chrome_trace(str(trace))
    found = summarize(read_trace(trace), PROFILED_STEPS)
    for row in found.waits:
        context.results.add("host waits", row)
    for row in found.kernels:
        context.results.add(f"{KERNELS_SHOWN} longest kernels", row)
    context.results.note(found.note)


def _activities() -> list[torch.profiler.ProfilerActivity]:
    """Return what is profiled: not torch's operators on the host, which would slow it down."""
    kinds, supported = torch.profiler.ProfilerActivity, torch.profiler.supported_activities()
    return [kinds.CUDA if kinds.CUDA in supported else kinds.CPU]


def _call_sites(context: Context, session: Session) -> None:
    """Add the lines of Python at which torch waits for the device, without those of NCCL."""
    synchronize(context)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            session.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    for place, number in Counter(_place(w.filename, w.lineno) for w in found).most_common():
        context.results.add("lines that wait", {"line": place, "per step": number})
    if not found:
        context.results.note("no line waits for the device")


def _place(file: str, line: int) -> str:
    parts = Path(file).parts
    with suppress(ValueError):
        parts = parts[parts.index("site-packages") + 1 :]
    return f"{'/'.join(parts[-3:])}:{line}"
