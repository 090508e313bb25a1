"""Parity of parallel layouts on up to eight processes with a single process, over twenty steps.

Losses, gradient norms, the validation loss and the final weights are compared. The gradient norm
detects errors that the loss hides, such as gradients that are not summed over a group. Mutations of
that kind must be detected.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.datasets import VOCAB_SIZE, write_folds
from tests.support.proof import complete_iterations
from tests.support.timeouts import PROCESS_TIMEOUT, TIMEOUT
from tests.support.tolerances import TRAINED, assert_within, distance
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
from tests.support.witness import read_weights

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * TIMEOUT)]  # forty runs

STEPS = 20
PACKED = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
CP2, CP4 = ("--context-parallel-size", 2), ("--context-parallel-size", 4)
TP4 = ("--tensor-model-parallel-size", 4)
PP4 = ("--pipeline-model-parallel-size", 4)
SELECTIVE = ("--recompute-granularity", "selective")
MODULES = (*SELECTIVE, "--recompute-modules", "core_attn", "layernorm", "mlp")
EXPERT_MODULES = (*SELECTIVE, "--recompute-modules", "layernorm", "moe")
UNIFORM = ("--recompute-granularity", "full", "--recompute-method", "uniform",
           "--recompute-num-layers", 1)  # fmt: skip
BLOCK = ("--recompute-granularity", "full", "--recompute-method", "block",
         "--recompute-num-layers", 1)  # fmt: skip
FIRST1 = ("--decoder-first-pipeline-num-layers", 1)
LAST1 = ("--decoder-last-pipeline-num-layers", 1)
COUNTED = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
SPELLED = ("--pipeline-model-parallel-layout", "Et*3|t*2|t*3|L")
YARN = ("--position-embedding-type", "yarn", "--yarn-rotary-scaling-factor", 4,
        "--yarn-original-max-position-embeddings", 8)  # fmt: skip
SIX, EIGHT = ("--num-layers", 6), ("--num-layers", 8)

EXPERTS = ("--num-experts", 4, "--moe-ffn-hidden-size", 48, "--moe-aux-loss-coeff", 0.01,
           "--moe-z-loss-coeff", 0.001)  # fmt: skip
SHARED = ("--moe-layer-freq", "[0,1]*2", "--moe-shared-expert-intermediate-size", 32,
          "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias",
          "--moe-router-load-balancing-type", "seq_aux_loss")  # fmt: skip
EP2, EP4 = ("--expert-model-parallel-size", 2), ("--expert-model-parallel-size", 4)
ETP1 = ("--expert-tensor-parallel-size", 1)
ALL_TO_ALL = ("--moe-token-dispatcher-type", "alltoall")

MODELS = {
    "llama": ("laptop-llama",),
    "deep": ("laptop-llama", *EIGHT),
    "packed": ("laptop-llama", *PACKED),
    "gpt2": ("laptop-gpt2", "--hidden-dropout", 0, "--attention-dropout", 0),
    "six": ("laptop-gpt2", "--hidden-dropout", 0, "--attention-dropout", 0, *SIX),
    "dropout": ("laptop-gpt2", "--hidden-dropout", 0.2, "--attention-dropout", 0),
    "neox": ("laptop-gpt-neox",),
    "parallel": ("laptop-gpt-neox", "--use-parallel-residual"),
    "yarn": ("laptop-llama", *YARN),
    "qwen": ("laptop-llama", "--qk-layernorm"),
    "experts": ("laptop-llama", *EXPERTS),
    "shared": ("laptop-llama", *EXPERTS, *SHARED),
}
ONES = {f"{model}-one": ((i % 8, i % 8 + 1), ()) for i, model in enumerate(MODELS)}
LAYOUTS = {
    # name: ranks, flags; comment: the feature that only this layout tests
    "llama-tp2-sp": ((0, 2), (*TP2, *SP, *DISTRIBUTED)),  # norms' gradients summed over TP
    "llama-pp2-vp2": ((2, 4), (*PP2, *VP2)),  # sends and receives of one pair of ranks
    "gpt2-pp2": ((4, 6), PP2),  # the tied embeddings' gradients summed over the pair
    "llama-dp2": ((6, 8), ()),  # gradients averaged without the distributed optimizer
    "gpt2-pp2-vp2": ((0, 2), (*PP2, *VP2, *DISTRIBUTED)),
    "gpt2-dp2-overlap": ((2, 4), (*DISTRIBUTED, *OVERLAP)),
    "llama-tp2-selective": ((4, 6), (*TP2, *MODULES)),
    "qwen-tp2": ((2, 4), TP2),  # gradients of the heads' norms summed over TP
    "parallel-tp2-sp": ((6, 8), (*TP2, *SP)),
    "gpt2-pp2-first1": ((0, 2), (*PP2, *FIRST1)),
    "neox-pp2-last1": ((2, 4), (*PP2, *LAST1, *BLOCK)),
    "parallel-pp2-uniform": ((4, 6), (*PP2, *UNIFORM)),
    "llama-tp2-pp2": ((0, 4), (*TP2, *PP2, *SP, *DISTRIBUTED, "--num-workers", 2)),
    "llama-pp2-dp2": ((4, 8), (*PP2, *DISTRIBUTED, *OVERLAP, *UNIFORM)),
    "deep-pp4-vp2": ((4, 8), (*PP4, *VP2)),  # batched sends and receives
    "deep-pp4-spelled": ((0, 4), (*PP4, *SPELLED)),  # a last stage without layers
    "six-pp4-counted": ((4, 8), (*PP4, *COUNTED, *DISTRIBUTED)),
    "packed-tp2-pp2": ((4, 8), (*TP2, *PP2)),
    "packed-pp4": ((0, 4), (*PP4, *UNIFORM)),  # middle stages read the documents' boundaries only
    "dropout-tp4": ((0, 4), TP4),  # one mask on all ranks of a tensor-parallel group
    "neox-cp2": ((0, 2), CP2),  # the rotary embedding of parts of a sequence
    "gpt2-cp2": ((2, 4), (*CP2, *DISTRIBUTED)),  # tied embeddings on one stage, positions of parts
    "packed-cp4": ((4, 8), (*CP4, *DISTRIBUTED, *OVERLAP)),  # parts with few tokens in the loss
    "packed-cp2-pp2": ((0, 4), (*CP2, *PP2, *SELECTIVE)),
    # Scaled frequencies of parts of a sequence, and the scale of their queries and keys.
    "yarn-cp2-dp2": ((4, 8), (*CP2, *DISTRIBUTED, *OVERLAP, *UNIFORM)),
    "packed-cp2-eight": ((0, 8), (*CP2, *TP2, *PP2, *VP2, *SP, *DISTRIBUTED, *OVERLAP)),
    "llama-eight": ((0, 8), (*TP2, *PP2, *SP, *DISTRIBUTED, *OVERLAP)),
    "gpt2-eight": ((0, 8), (*TP2, *PP2, *VP2, *SP, *DISTRIBUTED, *OVERLAP)),
    "neox-eight": ((0, 8), (*TP2, *PP2, *SP, *SELECTIVE)),
    "experts-ep2": ((0, 2), EP2),  # gradients of experts averaged over all ranks
    "experts-tp2": ((2, 4), (*TP2, *SP, *DISTRIBUTED)),
    "experts-ep4": ((4, 8), (*EP4, *ALL_TO_ALL, *DISTRIBUTED, *OVERLAP, *UNIFORM)),
    "shared-cp2-ep2": ((0, 4), (*CP2, *EP2, *ALL_TO_ALL, *DISTRIBUTED)),
    # Biases are updated by the tokens of all ranks.
    "shared-tp2-ep2": ((4, 8), (*TP2, *SP, *EP2, *EXPERT_MODULES)),
    "experts-eight": ((0, 8), (*TP2, *PP2, *SP, *EP2, *ALL_TO_ALL, *DISTRIBUTED, *OVERLAP)),
    "experts-eight-ep4": ((0, 8), (*TP2, *PP2, *VP2, *SP, *EP4, *ETP1, *ALL_TO_ALL, *DISTRIBUTED)),
    "shared-eight": ((0, 8), (*TP2, *PP2, *SP, *EP4, *ETP1, *DISTRIBUTED, *OVERLAP)),
    "deep-eight": ((0, 8), (*TP2, *PP4, *VP2, *SP, *DISTRIBUTED)),
}
MUTATED = {
    "tied_embeddings_apart": ("gpt2", (0, 2), PP2),
    "norms_apart": ("llama", (2, 4), (*TP2, *SP)),
    "tokens_weigh_alike": ("packed", (4, 5), ()),
}
INITIAL = (
    ("initial-one", (0, 1), ()),
    ("initial-tp2", (2, 4), (*TP2, *SP)),
    ("initial-pp2-vp2", (0, 2), (*PP2, *VP2)),
)
"""Runs of one step with a learning rate of 0."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    folds = write_folds(folder, (STEPS,))  # one fold: runs save at the end of every fold
    # The padded vocabulary is part of the softmax, so it must be equal in all layouts. With a
    # smaller epsilon, Adam would amplify gradients that are 0 except for rounding (key biases).
    same = {"padded_vocab_size": 512, "adam_eps": 1e-5}

    def words(model, *flags):
        preset, *more = MODELS[model]
        return tuple(arguments(preset, folds, *more, *flags, **same))

    jobs = [
        Job(name, ranks, words(name.split("-")[0], *flags))
        for name, (ranks, flags) in {**ONES, **LAYOUTS}.items()
    ]
    jobs += [
        Job(fault, ranks, words(model, *flags), fault)
        for fault, (model, ranks, flags) in MUTATED.items()
    ]
    for name, ranks, flags in INITIAL:
        once = ("--train-iters", 1, "--lr-decay-iters", 9, "--eval-iters", 0)
        jobs.append(Job(name, ranks, tuple(arguments("laptop-gpt2", folds, *flags, *once))))
    train_all(jobs, 8, folder, timeout=3 * PROCESS_TIMEOUT)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_numbers_as_one_process(runs, name):
    one = runs / f"{name.split('-')[0]}-one"
    rates = history(one, "learning rate")
    assert len(rates) == STEPS
    assert history(runs / name, "learning rate") == rates
    for value, found in distances(one, runs / name).items():
        assert_within(found, TRAINED, value)


@pytest.mark.parametrize("mutation", MUTATED)
def test_a_mutation_is_detected(runs, mutation):
    assert (
        max(distances(runs / f"{MUTATED[mutation][0]}-one", runs / mutation).values())
        > 10 * TRAINED
    )


def distances(one, other):
    """Return the distances of two runs."""
    found = {}
    for value in ("lm loss", "grad norm", "validation/valid"):
        expected, values = history(one, value), history(other, value)
        found[value] = distance(values, expected)
    whole, parts = weights(one), weights(other)
    assert parts.keys() == whole.keys()
    found["weights"] = max(distance(parts[k], whole[k]) for k in whole)
    return found


def test_initial_weights_do_not_depend_on_the_layout(runs):
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
    """Return the parameters of a checkpoint, without vocabulary padding."""
    found = read_weights(save / f"iter_{complete_iterations(save)[-1]:07d}")
    return {k: v[:VOCAB_SIZE] if "word_embeddings" in k else v for k, v in found.items()}
