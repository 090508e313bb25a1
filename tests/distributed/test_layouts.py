"""One run in many layouts: losses and gradient norms are those of a single process.

The gradient norm is compared because it finds what a loss hides: gradients that were not summed
over a group, or that crossed in the pipeline.
"""

from __future__ import annotations

import pytest
import torch

from megatron_llmjp.convert import native
from tests.support.datasets import VOCAB_SIZE, write_folds
from tests.support.training import (
    DISTRIBUTED,
    OVERLAP,
    PP2,
    SP,
    TP2,
    VP2,
    Job,
    arguments,
    history,
    train_all,
)

NO_DROPOUT = ("--hidden-dropout", 0, "--attention-dropout", 0)
HIDDEN_DROPOUT = ("--hidden-dropout", 0.2, "--attention-dropout", 0)
PACKED = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
TP4 = ("--tensor-model-parallel-size", 4)
PP4 = ("--pipeline-model-parallel-size", 4)

MODELS = {
    "llama": ("laptop-llama",),
    "packed": ("laptop-llama", *PACKED),
    "gpt2": ("laptop-gpt2", *NO_DROPOUT),
    "dropout": ("laptop-gpt2", *HIDDEN_DROPOUT),
    "neox": ("laptop-gpt-neox",),
}
LAYOUTS = {
    # name: ranks, flags, what only this one would show
    "llama-one": ((0, 1), ()),
    "gpt2-one": ((1, 2), ()),
    "neox-one": ((2, 3), ()),
    "packed-one": ((3, 4), ()),
    "dropout-one": ((0, 1), ()),
    "llama-tp2-sp": ((0, 2), (*TP2, *SP, *DISTRIBUTED)),  # norms' gradients summed over TP
    "llama-pp2-vp2": ((2, 4), (*PP2, *VP2)),  # sends and receives of one pair of ranks
    "gpt2-pp2": ((0, 2), PP2),  # the tied embeddings' gradients summed over the pair
    "gpt2-pp2-vp2": ((2, 4), (*PP2, *VP2, *DISTRIBUTED)),
    "llama-tp2-pp2": ((0, 4), (*TP2, *PP2, *SP, *DISTRIBUTED, "--num-workers", 2)),
    "llama-pp2-dp2": ((0, 4), (*PP2, *DISTRIBUTED, *OVERLAP, "--recompute-granularity", "full",
                               "--recompute-method", "uniform", "--recompute-num-layers", 1)),
    "llama-pp4": ((0, 4), PP4),
    "gpt2-tp2-pp2": ((0, 4), (*TP2, *PP2, *SP, *DISTRIBUTED)),
    "neox-tp2-dp2": ((0, 4), (*TP2, *SP, *DISTRIBUTED, *OVERLAP)),
    "packed-tp2-pp2": ((0, 4), (*TP2, *PP2)),
    "dropout-tp4": ((0, 4), TP4),  # one mask on all ranks of a tensor-parallel group
}  # fmt: skip

INITIAL = (
    ("initial-one", (0, 1), ()),
    ("initial-tp2", (2, 4), (*TP2, *SP)),
    ("initial-pp2-vp2", (0, 2), (*PP2, *VP2)),
)
"""Runs of one step, which the warm-up takes with a learning rate of 0."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    folds = write_folds(folder, (1, 1, 1))
    jobs = []
    for name, (ranks, flags) in LAYOUTS.items():
        preset, *model = MODELS[name.split("-")[0]]
        # The same rows in every layout: their number takes part in the softmax.
        words = arguments(preset, folds, *model, *flags, padded_vocab_size=512)
        jobs.append(Job(name, ranks, tuple(words)))
    for name, ranks, flags in INITIAL:
        once = ("--train-iters", 1, "--lr-decay-iters", 9, "--eval-iters", 0)
        jobs.append(Job(name, ranks, tuple(arguments("laptop-gpt2", folds, *flags, *once))))
    train_all(jobs, 4, folder)
    return folder


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.endswith("-one")])
def test_same_numbers_as_one_process(runs, name):
    one = runs / f"{name.split('-')[0]}-one"
    for value in ("lm loss", "grad norm", "learning rate", "validation/valid"):
        expected = history(one, value)
        assert len(expected) == (1 if value.startswith("validation") else 3)
        assert history(runs / name, value) == pytest.approx(expected, rel=2e-5), value


def test_one_seed_gives_one_model(runs):
    whole = weights(runs / "initial-one")
    assert float(whole["decoder.layers.0.mlp.linear_fc1.weight"].std()) == pytest.approx(0.02, 0.1)
    for name in ("initial-tp2", "initial-pp2-vp2"):
        found = weights(runs / name)
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(value, found[key]), key
    layers = [whole[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(4)]
    assert not torch.equal(layers[0], layers[2])  # the first layers of two stages


def weights(save):
    """A checkpoint's parameters, without the padding of the vocabulary."""
    source = native.read(save)
    found = {name: read.read(name) for name, read in source.reads.items()}
    return {k: v[:VOCAB_SIZE] if "word_embeddings" in k else v for k, v in found.items()}
