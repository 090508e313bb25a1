"""Parity with Megatron-LM's training curves, from its checkpoints in fixtures/llama_small.

The expected losses and gradient norms were computed by Megatron-LM (core 0.12.1) from the same
weights and batches.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_llmjp.convert import cli as converter
from tests.support.tolerances import GRADIENT_NORM, LOSS, assert_close, distance
from tests.support.training import PP2, TP2, Job, history, train_all

FIXTURES = Path(__file__).parent / "fixtures" / "llama_small"
FLAGS = shlex.split("""
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --ffn-hidden-size 176 --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0.0 --attention-dropout 0.0
    --tokenizer-type NullTokenizer --vocab-size 500 --padded-vocab-size 512
    --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 2e-3 --min-lr 2e-4
    --lr-decay-style cosine --lr-decay-iters 20 --lr-warmup-iters 4 --weight-decay 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0 --seed 1234
    --log-interval 1 --eval-iters 0 --num-workers 0
""")
RUNS = {
    # name: ranks, checkpoint to load, flags
    "tp1pp1": ((0, 1), "start", ("--finetune",)),
    "tp1pp1-resumed": ((1, 2), "middle", ()),
    "tp2pp2": ((0, 4), "start", ("--finetune", *TP2, *PP2)),
    "tp2pp2-resumed": ((0, 4), "middle", (*TP2, *PP2, "--sequence-parallel")),
    "dp2-resumed": ((2, 4), "middle", ("--use-distributed-optimizer",)),
}
CURVES = (("lm loss", "lm_loss", LOSS), ("grad norm", "grad_norm", GRADIENT_NORM))
"""Metrics, by their names in our log and in the recorded files."""
MUTATED = {
    "everything_decays": ((0, 1), "start", ("--finetune",)),
    "schedule_ahead": ((1, 2), "start", ("--finetune",)),
    "norms_apart": ((0, 2), "start", ("--finetune", *TP2, "--sequence-parallel")),
}
"""Runs with a mutation of the trainer."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron_lm")
    for iteration, name, flags in ((0, "start", []), (10, "middle", ["--with-optimizer"])):
        source = FIXTURES / f"iter_{iteration:07d}"
        words = ["--to", "native", "--input", source, "--output", folder / name, *flags]
        assert converter.main([str(word) for word in words]) == 0
    data = ("--data-path", FIXTURES / "small_text_document", "--split", "100,0,0")
    data += ("--data-cache-path", folder / "cache")
    jobs = [
        Job(
            name,
            ranks,
            (*FLAGS, *data, "--load", folder / load, *flags),
            mutation=name if name in MUTATED else None,
        )
        for name, (ranks, load, flags) in {**RUNS, **MUTATED}.items()
    ]
    train_all(jobs, 4, folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_equal_curves(runs, name):
    golden = "golden_tp2pp2.json" if name.startswith("tp2") else "golden_tp1pp1.json"
    records = json.loads((FIXTURES / golden).read_text())["iterations"]
    first = 11 if name.endswith("resumed") else 1
    expected = {r["iteration"]: r for r in records if r["iteration"] >= first}
    for ours, theirs, tolerance in CURVES:
        found = history(runs / name, ours)
        assert_close(found, {i: r[theirs] for i, r in expected.items()}, tolerance, ours)
    rates = history(runs / name, "learning rate")
    assert rates == pytest.approx({i: r["lr_used"] for i, r in expected.items()}, rel=1e-9)


@pytest.mark.parametrize("mutation", MUTATED)
def test_a_mutation_is_detected(runs, mutation):
    """Losses and gradient norms differ by more than the tolerance."""
    records = json.loads((FIXTURES / "golden_tp1pp1.json").read_text())["iterations"]
    for ours, theirs, tolerance in CURVES:
        expected = {r["iteration"]: r[theirs] for r in records}
        assert distance(history(runs / mutation, ours), expected) > 10 * tolerance, ours
