"""Places in the code at which a rank waits: for other ranks, or for its GPU.

Over gloo a rank that waits for others stands in a collective. NCCL's collectives return at once:
the host waits later, where it reads a value from the GPU or synchronizes with it, or, if the queue
of launched kernels is full, in any operation on tensors. So a rank in such a place is probably a
victim of the rank that causes a hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Literal, NamedTuple

Wait = Literal["other ranks", "its GPU", ""]
"""What a rank waits for; empty if it does not wait."""

_COLLECTIVES = (
    "torch/distributed/",
    "p2p_communication.py",
    "param_and_grad_buffer.py",
    "megatron_llmjp/parallel/process_groups.py",
    "megatron_llmjp/parallel/rendezvous.py",
    "megatron_llmjp/training/stop_signals.py",
)
"""Files whose functions wait for other ranks; matched against the innermost stack frames."""

INNERMOST = 4
"""Number of stack frames that are compared with :data:`_COLLECTIVES`."""

GPU_WAITS: dict[str, tuple[str, ...]] = {
    "torch/cuda/__init__.py": ("synchronize",),
    "torch/cuda/streams.py": ("synchronize",),
    "megatron/core/optimizer/clip_grads.py": ("get_grad_norm_fp32",),
    "megatron_llmjp/training/expert_monitor.py": ("take",),
    "megatron_llmjp/training/metrics.py": ("state_dict",),
    "megatron_llmjp/training/train_step.py": ("is_finite_on_all_ranks", "means_over_ranks"),
    "megatron_llmjp/training/trainer.py": ("_log", "_step"),
}
"""Functions that read a value from the GPU or synchronize with it, by file."""

_GPU_LIBRARIES = (
    "/torch/",
    "/megatron/core/",
    "/transformer_engine/",
    "/triton/",
    "/torchinductor_",  # folder of the code that torch.compile generates
)
_HOST_WORK = (
    "/torch/utils/data/",
    "/torch/_dynamo/",
    "/torch/_inductor/",
    "/triton/compiler/",
    "/torch/multiprocessing/",
    "/torch/serialization.py",
    "/megatron/core/datasets/",
    "/megatron/core/dist_checkpointing/",
)
"""Parts of :data:`_GPU_LIBRARIES` that work on the host: data loading, compilation, files."""

_COMPILED = "/torch/_inductor/runtime/"
"""Launches of compiled kernels, within a folder of :data:`_HOST_WORK`."""


class Frame(NamedTuple):
    """A stack frame."""

    file: str
    function: str


def stack_frames(frame: FrameType | None) -> list[Frame]:
    """Return the frames of a stack, innermost last, without reading the sources."""
    frames = []
    while frame is not None:
        frames.append(Frame(frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return frames[::-1]


def is_known_wait(stack: Sequence[Frame], on_gpu: bool) -> bool:
    """Return whether a stack is in a collective or, on a GPU, in one of :data:`GPU_WAITS`.

    Such a wait may use CPU time: NCCL and CUDA poll.

    Args:
        stack: frames, innermost last.
        on_gpu: whether the rank trains on a GPU.
    """
    if any(part in frame.file for frame in stack[-INNERMOST:] for part in _COLLECTIVES):
        return True
    if not on_gpu or not stack:
        return False
    file, function = stack[-1]
    return any(file.endswith(name) and function in names for name, names in GPU_WAITS.items())


def find_wait(stack: Sequence[Frame], on_gpu: bool) -> Wait:
    """Return what a rank whose run has made no progress for minutes waits for.

    Args:
        stack: frames of its main thread, innermost last.
        on_gpu: whether the rank trains on a GPU.
    """
    if is_known_wait(stack, on_gpu=False):
        return "other ranks"
    if is_known_wait(stack, on_gpu) or (on_gpu and _operates_on_tensors(stack)):
        return "its GPU"
    return ""


def _operates_on_tensors(stack: Sequence[Frame]) -> bool:
    """Return whether the innermost frame launches kernels, which waits if their queue is full."""
    file = stack[-1].file if stack else ""
    if _COMPILED in file:
        return True
    is_library = any(part in file for part in _GPU_LIBRARIES)
    return is_library and not any(part in file for part in _HOST_WORK)
