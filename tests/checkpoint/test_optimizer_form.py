"""Bit-identical resume with another kind of optimizer or in another precision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_llmjp.parallel.launcher import free_port
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.proof import tensors
from tests.support.training import DISTRIBUTED, arguments

FORMS = {
    "fp32": (),
    "fp32-distributed": DISTRIBUTED,
    "bf16": ("--bf16",),
    "bf16-distributed": ("--bf16", *DISTRIBUTED),
    "fp16": ("--fp16",),
    "fp16-distributed": ("--fp16", *DISTRIBUTED),
}
CHANGES = [
    ("fp32", "fp32-distributed"), ("fp32", "bf16"), ("fp32", "bf16-distributed"),
    ("fp32-distributed", "fp32"), ("fp32-distributed", "bf16"),
    ("bf16", "fp32"), ("bf16", "fp32-distributed"), ("bf16", "bf16-distributed"), ("bf16", "fp16"),
    ("bf16-distributed", "fp32"), ("bf16-distributed", "bf16"),
    ("fp16-distributed", "bf16"), ("fp32", "fp16-distributed"),
]  # fmt: skip
"""Forms of the save and of the resume."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPIES = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")


def convert_on_rank(folder: str, words: dict[str, list[str]], port: str) -> None:
    """Save each form after a step on random gradients; load it into other forms and save again."""
    from megatron_llmjp.checkpoint.save import RunDescription, SaveProgress
    from megatron_llmjp.checkpoint.saver import FoldEnds, Saver
    from megatron_llmjp.checkpoint.sharded_state import RunState
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.config.loading import replace_fields
    from megatron_llmjp.data.batch_size import BatchSizeSchedule
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks
    from megatron_llmjp.run import resolve_run
    from megatron_llmjp.training import run_setup
    from megatron_llmjp.training.optimizer import LearningRateSchedule

    device = setup()
    ranks = Ranks(int(os.environ["RANK"]), 2, 0, "127.0.0.1", port, "test")
    configs = {name: parse(flags).config for name, flags in words.items()}
    process_groups.initialize(configs["fp32"], ranks, device)

    def save(config, name, step):
        run = resolve_run(config, 2)
        rates = LearningRateSchedule(
            run.config, run.schedule, BatchSizeSchedule(run.config), run.train_iters
        )
        model = run_setup.setup_model_and_optimizer(run, device, rates)
        if step:
            generator = torch.Generator().manual_seed(3)
            for parameter in model.chunks[0].parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.main_grad.copy_(gradient * 2.0**32)  # fp16's first loss scale
            model.scheduler.step(4)  # the warm-up begins with a learning rate of 0
            assert model.optimizer.step()[0]
        about = RunDescription(replace_fields(run.config, save=str(Path(folder) / name), load=None))
        state = RunState(model.chunks, model.optimizer, model.scheduler)
        Saver(about, FoldEnds((), frozenset()), lambda: None, 0).save(state, SaveProgress(1, 4))

    for name, config in configs.items():
        save(config, name, step=True)
    for source, target in CHANGES:
        config = replace_fields(configs[target], load=str(Path(folder) / source))
        save(config, f"{source} as {target}", step=False)
    process_groups.destroy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    folds = write_folds(folder)
    words = {name: arguments("laptop-llama", folds, *flags) for name, flags in FORMS.items()}
    run_ranks(convert_on_rank, 2, str(folder), words, str(free_port()))
    return folder


def main_weights(stored):
    """Return the fp32 main weights by name."""
    names = [name for name in stored if not name.startswith("optimizer.")]
    places = [[prefix + name for prefix in COPIES if prefix + name in stored] for name in names]
    return {name: stored[place[0]] for name, place in zip(names, places, strict=True)}


def groups(save):
    common = torch.load(save / "iter_0000001" / "common.pt", weights_only=True)
    state = common["optimizer"]
    found = (state if "param_groups" in state else state["optimizer"])["param_groups"]
    return [{k: v for k, v in group.items() if k != "params"} for group in found], common


@pytest.mark.parametrize(("source", "target"), CHANGES)
def test_nothing_is_lost(folder, source, target):
    before = tensors(folder / source)
    after = tensors(folder / f"{source} as {target}")
    assert after.keys() == tensors(folder / target).keys()
    old, new = main_weights(before), main_weights(after)
    dtype = TYPES[target[:4]]
    for name, weight in old.items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float()), f"{name} was not updated"
        assert torch.equal(new[name], weight), name
        assert torch.equal(after[name], weight.to(dtype)), name
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{name}"
            assert before[key].abs().max() > 0
            assert torch.equal(after[key], before[key]), key
    settings, common = groups(folder / f"{source} as {target}")
    expected, saved = groups(folder / source)
    assert settings == expected and {group["step"] for group in settings} == {1}
    assert common["opt_param_scheduler"] == saved["opt_param_scheduler"]
