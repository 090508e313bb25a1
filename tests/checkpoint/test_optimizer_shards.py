"""Optimizer state that every rank writes and reads in part, compared with megatron-core's own form.

Moments are set to multiples of the weights, so that each element shows where it comes from.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llmjp.parallel.launcher import free_port
from megatron_llmjp.patches.optimizer_shards import rectangles
from tests.support.processes import run_ranks
from tests.support.witness import read_tensors

WORDS = shlex.split("""
    --config laptop-llama --vocab-size 100 --hidden-size 24 --num-attention-heads 4 --num-layers 3
    --num-query-groups 2 --ffn-hidden-size 50 --use-distributed-optimizer
""")
"""Rows and columns that are no powers of two: the bounds of shards lie within rows."""
STATES = {"param": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}
SMALL, LARGE = 1000, 10**6
SAVES = {
    # name: tensor parallel size, whether ranks save their parts, elements per bucket
    "parts": (1, True, SMALL),  # several padded buckets
    "parts-tp2": (2, True, LARGE),
    "whole": (1, False, LARGE),  # megatron-core's own form, which shifts states of several buckets
    "no-step": (1, True, LARGE),
}
LOADS = [
    ("parts", 1, True, LARGE), ("parts", 1, True, SMALL), ("parts", 2, True, SMALL),
    ("parts-tp2", 1, True, SMALL), ("whole", 1, True, SMALL), ("whole", 2, True, LARGE),
    ("parts", 1, False, LARGE), ("parts-tp2", 1, False, LARGE),
]  # fmt: skip
"""Save to load, and how: tensor parallel size, whether ranks load their parts, bucket size."""


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5), (1, 1, 3), (4, 1)])
def test_rectangles_are_the_range(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, end in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        parts = list(rectangles(shape, start, end))
        assert len(parts) <= 2 * len(shape) - 1
        found: list[int] = []
        for part in parts:
            spans = zip(part.offsets, part.sizes, strict=True)
            box = numbers[tuple(slice(first, first + size) for first, size in spans)].flatten()
            assert (int(box[0]), len(box)) == (part.start, part.numel)
            found += box.tolist()
        assert found == list(range(start, end))


def save_and_load(folder: str, port: str) -> dict[str, Any]:
    """Save in all forms, load in all ways; return written bytes by save, wrong shards by load."""
    from megatron.core import optimizer as core_optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_llmjp.checkpoint import sharded_state
    from megatron_llmjp.checkpoint.save import RunDescription, SaveProgress
    from megatron_llmjp.checkpoint.saver import FoldEnds, Saver
    from megatron_llmjp.checkpoint.sharded_state import RunState
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.config.loading import replace_fields
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks
    from megatron_llmjp.parallel.rendezvous import rendezvous
    from megatron_llmjp.patches.fused_adamw import register_fused_adamw
    from megatron_llmjp.patches.optimizer_shards import shard_by_rank

    class NoScheduler:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    device, rank = setup(), int(os.environ["RANK"])
    ranks = Ranks(rank, 2, 0, "127.0.0.1", port, "test")
    store, numbers = rendezvous(ranks), itertools.count()
    register_fused_adamw()

    def make(tp: int, in_parts: bool, bucket_size: int) -> tuple[Any, RunState, Any]:
        words = [*WORDS, "--tensor-model-parallel-size", str(tp), "--padded-vocab-size", "128"]
        config = parse(words).config
        own = torch.distributed.PrefixStore(str(next(numbers)), store)
        process_groups.initialize(config, ranks, device, own)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket_size
        )
        (model,) = build_model(config, device)
        chunk = DistributedDataParallel(model.config, settings, model)
        settings = core_optimizer.OptimizerConfig(
            optimizer="adam", lr=0.1, use_distributed_optimizer=True, params_dtype=torch.float32
        )
        optimizer = core_optimizer.get_megatron_optimizer(
            settings, [chunk], use_gloo_process_groups=False
        )
        (part,) = optimizer.chained_optimizers
        if in_parts:
            shard_by_rank(part)
        return config, RunState([chunk], optimizer, NoScheduler()), part

    def states(part: Any) -> list[dict[str, torch.Tensor]]:
        adam = part.optimizer
        groups = [group["params"] for group in adam.param_groups]
        return [{"param": p.detach(), **adam.state[p]} for p in itertools.chain(*groups)]

    written, wrong = {}, {}
    for name, how in SAVES.items():
        config, state, part = make(*how)
        if name != "no-step":
            state.chunks[0].zero_grad_buffer()
            part.step()
            for shard in states(part):
                for key, factor in STATES.items():
                    shard[key].copy_(factor * shard["param"])
        config = replace_fields(config, save=str(Path(folder) / name))
        saver = Saver(RunDescription(config), FoldEnds(), lambda: None, 0)
        saver.save(state, SaveProgress(1, 4))
        saver.close()
        own = (Path(folder) / name / "iter_0000001").glob(f"__{rank}_*.distcp")
        written[name] = sum(file.stat().st_size for file in own)
        process_groups.destroy()
    for source, *how in LOADS:
        _, state, part = make(*how)
        with torch.no_grad():
            for parameter in state.chunks[0].parameters():
                parameter.fill_(7.0)
        sharded_state.load_checkpoint(Path(folder) / source / "iter_0000001", state)
        wrong[f"{source} {how}"] = sum(
            not torch.equal(shard[key], factor * shard["param"]) or bool((shard[key] == 7.0).any())
            for shard in states(part)
            for key, factor in STATES.items()
        )
        process_groups.destroy()
    return {"written": written, "wrong": wrong}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, run_ranks(save_and_load, 2, str(folder), str(free_port()))


@pytest.mark.parametrize("name", SAVES)
def test_every_element_is_saved_at_its_place(saved, name):
    found = read_tensors(saved[0] / name / "iter_0000001")
    weights = [key for key in found if not key.startswith("optimizer.")]
    assert len(weights) > 5 and len(found) == 4 * len(weights)
    for key in weights:
        for state, factor in STATES.items():
            expected = found[key] * (0.0 if name == "no-step" and state != "param" else factor)
            assert torch.equal(found[f"optimizer.state.{state}.{key}"], expected), (state, key)


def test_all_forms_hold_the_same(saved):
    first, *others = (read_tensors(saved[0] / n / "iter_0000001") for n in SAVES if n != "no-step")
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in first.items())


def test_every_load_is_exact(saved):
    for result in saved[1]:
        assert len(result["wrong"]) == len(LOADS)
        assert not any(result["wrong"].values()), result["wrong"]


def test_ranks_write_equal_parts(saved):
    for name in SAVES:
        first, second = (result["written"][name] for result in saved[1])
        assert abs(first - second) < 0.25 * (first + second), name
