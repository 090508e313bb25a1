"""The optimizer in one process: weight decay, and steps compared with megatron-core's own."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, assert_close

LR, DECAY = 0.25, 0.5
GRADIENTS = (1e-3, 2.0, float("inf"), 0.5, float("nan"), float("inf"), 1e-2)
"""Sizes of the gradients of each step."""


def step_without_gradients() -> list[list[object]]:
    """Return, for AdamW and SGD, each parameter's name, dimensions and shrinkage by a step."""
    import torch

    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process
    from megatron_llmjp.training.optimizer import build_optimizer, wrap_for_data_parallel

    device = setup()
    found: list[list[object]] = []
    for kind in ("adam", "sgd"):
        words = ["--config", "laptop-gpt2", "--vocab-size", 100, "--optimizer", kind]
        words += ["--lr", LR, "--weight-decay", DECAY, "--hidden-size", 32]
        config = parse([str(word) for word in words]).config
        process_groups.initialize(config, single_process(), device)
        chunks = wrap_for_data_parallel(build_model(config, device), config)
        optimizer = build_optimizer(chunks, config)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = LR, DECAY * group["wd_mult"]
        before = {}
        for name, parameter in chunks[0].named_parameters():
            parameter.data.fill_(1.0)  # the effect of weight decay is visible on all parameters
            before[name] = parameter.detach().clone()
        chunks[0].zero_grad_buffer()
        optimizer.step()
        for name, parameter in chunks[0].named_parameters():
            factor = float((parameter.detach() / before[name]).mean())
            assert torch.all(parameter.detach() == parameter.detach().flatten()[0])
            found.append([kind, name, parameter.dim(), factor])
        process_groups.destroy()
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(step_without_gradients, 1)[0]


def test_weight_decay_excludes_norms_and_biases(found):
    names = [name for _, name, _, _ in found]
    assert any(name.endswith("linear_fc1.bias") for name in names)
    assert any("layernorm.weight" in name for name in names), json.dumps(names)
    for kind, name, dimensions, factor in found:
        excluded = name.endswith("bias") or "layernorm" in name
        assert excluded == (dimensions == 1)
        assert_close(factor, 1.0 if excluded else 1 - LR * DECAY, ELEMENTWISE, f"{kind} {name}")


def step_like_megatron(kind: str, distributed: bool) -> dict[str, object]:
    """Return whether our steps and those of megatron-core's ``step`` leave the same state."""
    import torch

    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process
    from megatron_llmjp.training.optimizer import build_optimizer, wrap_for_data_parallel
    from megatron_llmjp.training.train_step import _clip_and_update

    device = setup()
    words = ["--config", "laptop-llama", "--vocab-size", "100", "--hidden-size", "32"]
    words += ["--lr", "0.1", *([f"--{kind}"] if kind != "fp32" else [])]
    words += ["--initial-loss-scale", "1024", "--hysteresis", "2", "--loss-scale-window", "2"]
    config = parse([*words, *(["--use-distributed-optimizer"] if distributed else [])]).config
    process_groups.initialize(config, single_process(), device)
    states = []
    for ours in (True, False):
        chunks = wrap_for_data_parallel(build_model(config, device), config)
        optimizer = build_optimizer(chunks, config)
        state: list[object] = []
        for seed, size in enumerate(GRADIENTS if kind == "fp16" else (1e-3, 2.0, 1e-2)):
            generator = torch.Generator().manual_seed(seed)
            for parameter in chunks[0].parameters():
                value = torch.randn(parameter.shape, generator=generator).clamp(-2, 2)
                parameter.main_grad.copy_(value * float(optimizer.get_loss_scale()))
            parameter.main_grad.view(-1)[3] = size * float(optimizer.get_loss_scale())
            updated, norm = (
                _clip_and_update(optimizer, lambda norm: True) if ours else optimizer.step()[:2]
            )
            weights = [p.detach().float().double().sum().item() for p in chunks[0].parameters()]
            norm = norm if updated else None
            state.append([bool(updated), norm, float(optimizer.get_loss_scale()), weights])
        states.append(state)
    process_groups.destroy()
    return {"same": states[0] == states[1], "updated": [step[0] for step in states[0]]}


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_steps_are_those_of_megatron_core(kind, distributed):
    """Gradient norm, clipping, loss scale and weights, bit for bit, with overflows in fp16."""
    found = run_ranks(step_like_megatron, 1, kind, distributed)[0]
    expected = [abs(size) < float("inf") for size in GRADIENTS] if kind == "fp16" else [True] * 3
    assert found == {"same": True, "updated": expected}


def compare_kernels() -> list[bool]:
    """Return whether the foreach kernels equal megatron-core's loops over tensors."""
    import torch
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    from megatron_llmjp.patches.foreach_norm import l2_norm, scale
    from megatron_llmjp.patches.torch_cuda_on_cpu import substitute_cpu_for_cuda

    substitute_cpu_for_cuda()
    generator, flag = torch.Generator().manual_seed(1), torch.zeros(1, dtype=torch.int)
    sizes = enumerate((1, 7, 4, 1000))
    tensors = [torch.randn(n, generator=generator) * 10.0**i for i, n in sizes]
    expected, _ = local_multi_tensor_l2_norm(0, flag, [tensors], False)
    found, _ = l2_norm(0, flag, [tensors], False)
    results = [torch.equal(expected, found) and found.shape == (1,)]
    for factor in (0.3, 1.0):
        copies = [[t.clone() for t in tensors] for _ in range(2)]
        local_multi_tensor_scale(0, flag, [copies[0], copies[0]], factor)
        scale(0, flag, [copies[1], copies[1]], factor)
        halves = [[t.bfloat16() for t in tensors] for _ in range(2)]
        local_multi_tensor_scale(0, flag, [tensors, halves[0]], factor)
        scale(0, flag, [tensors, halves[1]], factor)
        for ours, theirs in (copies, halves):
            results.append(all(map(torch.equal, ours, theirs)))
    return results


def test_foreach_kernels():
    assert run_ranks(compare_kernels, 1)[0] == [True] * 5
