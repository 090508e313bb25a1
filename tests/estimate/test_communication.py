"""Communication volume compared with the c10d operators of a real step."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.communication import communication_volume
from megatron_llmjp.estimate.layout import make_layout
from tests.estimate.test_memory import CP, FULL, PP, TP, make, run_micro_batches
from tests.support.processes import run_ranks
from tests.support.training import rendezvous_port

FOUR = {**PP, "global_batch_size": 32}
DP = {"global_batch_size": 16}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("laptop-llama", TP),
    ("laptop-gpt-neox", {**TP, "bf16": True, **FULL}),
    ("laptop-llama", {**TP, "sequence_parallel": True, "bf16": True}),
    ("laptop-llama", {**TP, "sequence_parallel": True, "bf16": True, **FULL}),
    ("laptop-llama", FOUR),
    ("laptop-gpt2", FOUR),
    ("laptop-llama", {**FOUR, "virtual_pipeline_model_parallel_size": 2, "bf16": True}),
    ("laptop-llama", DP),
    ("laptop-gpt2", {**DP, "use_distributed_optimizer": True, "bf16": True}),
    ("laptop-llama", CP),
    ("laptop-gpt2", {**CP, "recompute_granularity": "selective", "reset_attention_mask": True}),
    ("laptop-llama", {**CP, **FULL, "bf16": True}),
]


def count_all(cases: list[tuple[str, dict[str, Any]]], folder: str) -> list[dict[str, int]]:
    """Return the bytes that this rank sends per step by operator, for each case."""
    import os

    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks

    device, found = setup(), []
    me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, (name, values) in enumerate(cases):
        config = make(name, values)
        port = rendezvous_port(Path(folder) / f"{number}.port", me == 0)
        process_groups.initialize(config, Ranks(me, world, 0, "127.0.0.1", port, "test"), device)
        found.append(count(config, device))
        process_groups.destroy()
    return found


def count(config: Config, device: Any) -> dict[str, int]:
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.training.optimizer import build_optimizer, wrap_for_data_parallel
    from megatron_llmjp.training.train_step import configure_schedules

    chunks = wrap_for_data_parallel(build_model(config, device), config)
    optimizer = build_optimizer(chunks, config)
    configure_schedules(chunks, optimizer, config)
    sent: Counter[str] = Counter()

    class CountSentBytes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                ranks = dist.ProcessGroup.unbox(group_of(args)).size()
                name = func._schema.name.removeprefix("c10d::").strip("_")
                sent[name] += sent_by(name, args, ranks)
            return func(*args, **(kwargs or {}))

    with CountSentBytes():
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_micro_batches(chunks, config)
        optimizer.step()
    return dict(sent)


def group_of(args: Any) -> Any:
    """Return the process group among the arguments of an operator."""
    import torch

    return next(a for a in args if isinstance(a, torch.ScriptObject) and "Group" in str(a._type()))


def sent_by(name: str, args: Any, ranks: int) -> int:
    """Return the bytes that each of ``ranks`` ranks sends in a ring algorithm."""
    import torch

    sizes = []
    for argument in args[:2]:
        tensors = argument if isinstance(argument, list | tuple) else [argument]
        if all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    if name in ("send", "recv"):
        return sizes[0] if name == "send" else 0
    return max(sizes) * (ranks - 1) // ranks * (2 if name.startswith("allreduce") else 1)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return run_ranks(count_all, 2, CASES, str(tmp_path_factory.mktemp("ports")))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_bytes_per_step(counted, number):
    config = make(*CASES[number])
    layout = make_layout(config, 2)
    for rank in range(2):
        found = counted[rank][number]
        estimated = communication_volume(config, layout, rank * layout.pp // 2, False)
        assert sum(found.values()) == pytest.approx(sum(astuple(estimated)), rel=0.005)
        assert found.get("send", 0) == estimated.pipeline
