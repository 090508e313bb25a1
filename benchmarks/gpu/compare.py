"""Parts ``compare-*``: a step of this project and the same step of transformers, alternately.

Both models are in one process, with the same sizes, batch, attention (SDPA's kernels), clipping and
AdamW (fused). This project trains bf16 weights with fp32 main weights and gradients. The other side
is what users of transformers write: fp32 weights under bf16 autocast, with the layers and the loss
compiled by ``torch.compile`` (each layer by itself, which compiles one instead of 24), and z-loss
where the preset has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.results import Context
from benchmarks.gpu.session import Session, synchronize
from benchmarks.gpu.step import mfu, predicted_bytes
from benchmarks.train_step import random_batches, their_model, their_optimizer

STEPS_PER_TURN = 2
WARM_UP = 3
THEIR_BYTES_PER_PARAMETER = 16
"""Weights, gradients and two moments in fp32."""


def measure(context: Context, preset: str) -> None:
    """Measure both sides in turns and record the ratio of their speeds."""
    session = Session(context, preset)
    size = _micro_batch_size(context, session)
    session.use_micro_batch_size(size)
    config = session.config
    sides: dict[str, Callable[[], object]] = {"ours": session.step}
    sides["transformers"], parameters = their_step(context, config)
    assert parameters == session.parameters, f"{parameters} and {session.parameters} parameters"
    context.results.note(f"ours: {session.layer_classes}")
    context.results.note(
        "transformers: fp32 weights under bf16 autocast, layers and loss by torch.compile (backend "
        f"{context.scale.compile_backend}), torch's fused AdamW"
    )
    for step in sides.values():
        for _ in range(WARM_UP):
            step()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(context.scale.rounds):
        for name in sides if turn % 2 else reversed(sides):
            found[name].append(_seconds(context, sides[name]))
    ratios = [theirs / ours for ours, theirs in zip(*found.values(), strict=True)]
    seconds = {name: statistics.median(times) for name, times in found.items()}
    context.results.add(
        "speeds",
        {
            "tokens per sample": config.data.seq_length,
            "micro-batch size": size,
            **{f"{name} tokens/s": session.tokens_per_step / s for name, s in seconds.items()},
            **{f"{name} MFU": mfu(session, s) for name, s in seconds.items()},
            "ratio (range)": f"{statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
        },
    )
    session.close()


def _seconds(context: Context, step: Callable[[], object]) -> float:
    synchronize(context)
    start = time.perf_counter()
    for _ in range(STEPS_PER_TURN):
        step()
    synchronize(context)
    return (time.perf_counter() - start) / STEPS_PER_TURN


def _micro_batch_size(context: Context, session: Session) -> int:
    """Return the largest size up to the preset's for which both models fit the GPU together.

    Activations share the allocator's memory; those of the other side, which keeps the logits in
    fp32, are assumed to be half as large again.
    """
    largest = context.scale.micro_batch_sizes[0]
    if not context.is_cuda:
        return largest
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
    states = (18 + THEIR_BYTES_PER_PARAMETER) * session.parameters
    for size in (largest, largest // 2, 1):
        activations = predicted_bytes(session, size) - 18 * session.parameters
        if states + 1.5 * activations < 0.95 * free:
            return size
    return 1


def their_step(context: Context, config: Any) -> tuple[Callable[[], object], int]:
    """Return a step with transformers' model, and its number of parameters."""
    import transformers

    device = torch.device(context.device)
    with device:
        model = their_model(config, transformers)
    o, z_loss = config.optimizer, config.training.z_loss_strength
    optimizer = their_optimizer(model, o, lr=1e-6)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.flatten(0, 1).float()
        value = F.cross_entropy(logits, labels.flatten())
        return value + z_loss * logits.logsumexp(-1).square().mean() if z_loss else value

    compile_options: dict[str, Any] = {"backend": context.scale.compile_backend, "dynamic": False}
    torch._dynamo.config.recompile_limit = 4 * config.model.num_layers  # never fall back to eager
    for layer in _layers(model, config.model.num_layers):
        layer.compile(**compile_options)
    compiled_loss = torch.compile(loss, **compile_options)
    number = config.training.global_batch_size // config.training.micro_batch_size
    batches = [
        (batch["tokens"].to(device), batch["labels"].to(device))
        for batch in random_batches(config, number)
    ]

    def step() -> None:
        optimizer.zero_grad()
        for tokens, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                value = compiled_loss(model(tokens, use_cache=False).logits, labels)
            (value / number).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()

    return step, sum(p.numel() for p in model.parameters())


def _layers(model: torch.nn.Module, number: int) -> torch.nn.ModuleList:
    """Return the list of transformer layers of a model."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(found for found in lists if len(found) == number)
