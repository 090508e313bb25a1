"""Configuration section of profilers and of reports on memory."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_llmjp.config.section import Section


class ProfilingConfig(Section):
    """Profilers of a range of iterations, NVTX ranges and memory snapshots."""

    profile: bool = Field(
        False,
        description="profile a range of iterations on some ranks: start and stop nsys (with "
        "--capture-range=cudaProfilerApi), or write a trace with use_pytorch_profiler",
    )
    profile_step_start: NonNegativeInt = Field(
        10, description="profile: number of iterations before the first profiled one"
    )
    profile_step_end: PositiveInt = Field(12, description="profile: last profiled iteration")
    profile_ranks: tuple[NonNegativeInt, ...] = Field((0,), description="profile: ranks to profile")
    use_pytorch_profiler: bool = Field(
        False,
        description="profile: write a trace of PyTorch's profiler to SAVE/profile instead of "
        "controlling nsys",
    )
    record_shapes: bool = Field(
        False, description="profile: record the shapes of the operators' inputs"
    )
    nvtx_ranges: bool = Field(
        False, description="emit NVTX ranges for the parts of a step, for nsys"
    )
    record_memory_history: bool = Field(
        False,
        description="record allocations of GPU memory, and write a snapshot when memory runs out "
        "and at the end of the profiled iterations",
    )
    memory_snapshot_path: str | None = Field(
        None, description="file of memory snapshots; default: SAVE/profile/memory.pickle"
    )


def profiling_problems(
    profiling: ProfilingConfig, save: str | None, world_size: int
) -> Iterator[str]:
    """Yield one line for each violated rule.

    Args:
        profiling: the section.
        save: folder of the checkpoints, which traces are written to.
        world_size: number of ranks.
    """
    if not profiling.profile:
        for name in ("use_pytorch_profiler", "record_shapes"):
            if getattr(profiling, name):
                yield f"{name} has no effect without profile: set profile, or remove {name}"
    else:
        yield from _range_problems(profiling, world_size)
    if save is None and profiling.profile and profiling.use_pytorch_profiler:
        yield "use_pytorch_profiler requires save, the folder of the traces (SAVE/profile)"
    if profiling.record_memory_history:
        if save is None and profiling.memory_snapshot_path is None:
            yield "record_memory_history requires save or memory_snapshot_path, for its snapshots"
    elif profiling.memory_snapshot_path is not None:
        yield "memory_snapshot_path has no effect without record_memory_history: set it"


def _range_problems(profiling: ProfilingConfig, world_size: int) -> Iterator[str]:
    first, last = profiling.profile_step_start, profiling.profile_step_end
    if last <= first:
        yield (
            f"profile_step_end {last} must be above profile_step_start {first}: iterations "
            f"{first + 1} to profile_step_end are profiled"
        )
    missing = [str(rank) for rank in profiling.profile_ranks if rank >= world_size]
    if missing:
        yield (
            f"profile_ranks {', '.join(missing)}: the run has ranks 0 to {world_size - 1} "
            f"({world_size} processes)"
        )
