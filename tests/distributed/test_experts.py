"""A mixture-of-experts run that is saved and resumed in other expert parallel layouts."""

from __future__ import annotations

import json

import pytest

from tests.support.datasets import write_folds
from tests.support.proof import complete_iterations
from tests.support.tolerances import TRAINED, assert_within, distance
from tests.support.training import (
    DISTRIBUTED,
    OVERLAP,
    PP2,
    SP,
    TP2,
    Job,
    arguments,
    history,
    train_all,
)
from tests.support.witness import read_weights

STEPS, SAVED = 6, 3
MODEL = ("--num-experts", 4, "--moe-ffn-hidden-size", 48, "--moe-layer-freq", "[0,1]*2",
         "--moe-shared-expert-intermediate-size", 32, "--moe-router-score-function", "sigmoid",
         "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", 0.05,
         "--moe-aux-loss-coeff", 0.02, "--moe-z-loss-coeff", 0.001)  # fmt: skip
ALL_TO_ALL = ("--moe-token-dispatcher-type", "alltoall")
EP2, EP4 = ("--expert-model-parallel-size", 2), ("--expert-model-parallel-size", 4)
RESUMED = {
    "tp2-ep4": (*TP2, *SP, *EP4, "--expert-tensor-parallel-size", 1, *ALL_TO_ALL),
    "pp2-ep2": (*PP2, *EP2, *DISTRIBUTED, *OVERLAP),
    "tp2-ep2": (*TP2, *SP, *EP2, *ALL_TO_ALL, *DISTRIBUTED),
}
"""Layouts that continue the run of :data:`EP4`, on four processes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    folds = write_folds(folder, (STEPS,))
    same = {"padded_vocab_size": 512, "adam_eps": 1e-5, "train_iters": STEPS}

    def words(*flags, **fields):
        return tuple(arguments("laptop-llama", folds, *MODEL, *flags, **{**same, **fields}))

    half = {"train_iters": SAVED, "lr_decay_iters": STEPS}
    jobs = [
        Job("whole", (0, 1), words()),
        Job("half", (0, 4), words(*EP4, *ALL_TO_ALL, *DISTRIBUTED, *OVERLAP, **half)),
    ]
    load = ("--load", folder / "half")
    jobs += [Job(name, (0, 4), words(*load, *flags)) for name, flags in RESUMED.items()]
    train_all(jobs, 4, folder)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_continues_in_another_layout_of_experts(runs, name):
    for value in ("lm loss", "grad norm", "params norm", "load balancing loss", "router z loss",
                  "expert load", "expert load/layer 2"):  # fmt: skip
        whole = history(runs / "whole", value)
        assert len(whole) == STEPS
        found = {**history(runs / "half", value), **history(runs / name, value)}
        assert_within(distance(found, whole), TRAINED, f"{name}: {value}")
    tokens, found = expert_tokens(runs / "whole"), expert_tokens(runs / name)
    assert found == tokens
    batch, topk = 4 * 32, 2
    assert {sum(counts) for counts in tokens["tokens"].values()} == {batch * topk}
    whole, found = weights(runs / "whole"), weights(runs / name)
    assert found.keys() == whole.keys()
    assert any("expert_bias" in key for key in whole)
    for key, value in whole.items():
        assert_within(distance(found[key], value), TRAINED, f"{name}: {key}")


def expert_tokens(save):
    return json.loads((save / "expert_tokens.json").read_text())


def weights(save):
    return read_weights(save / f"iter_{complete_iterations(save)[-1]:07d}")
