"""Weight decay of parameters by the optimizer, in one process."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, assert_close

LR, DECAY = 0.25, 0.5


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
