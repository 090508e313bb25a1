"""Logged metrics of runs: batch ramp-up, z-loss, dataset losses, norms, fp16, eval-only."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math

import pytest
import torch
import yaml

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.convert.cli import main as convert_checkpoint
from megatron_llmjp.report.history import read_history
from tests.support.datasets import write_dataset, write_folds
from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, LOSS, TRAINED, assert_close, distance
from tests.support.training import DISTRIBUTED, PP2, SP, TP2, Job, arguments, history
from tests.support.witness import read_weights

ONE, OTHER, BOTH = (0, 1), (1, 2), (0, 2)
RAMP = ("--rampup-batch-size", 2, 2, 4)
Z = ("--z-loss-strength", 1e-3)
TIMED = ("--save-interval-minutes", 1e-9, "--no-save-fold-ends")
FIXED = ("--padded-vocab-size", 256)
PACKED = (*FIXED, "--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
UNIFORM = ("--recompute-granularity", "full", "--recompute-method", "uniform",
           "--recompute-num-layers", 1)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Save folders of all runs of this file, trained by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    folds = write_folds(folder, (2, 2, 1))
    write_dataset(
        folder / "tiny", 2, seed=4, length=50
    )  # less than a batch, which it is repeated to fill
    declared = yaml.safe_load(folds.read_text())
    declared["validation"]["tiny"] = {"path": "tiny"}
    declared["folds"][2]["learning_rate"] = {"lr": 1e-3, "lr_decay_style": "constant"}
    folds.write_text(yaml.safe_dump(declared))
    jobs = []

    def add(name, ranks, preset, *flags, **small):
        jobs.append(Job(name, ranks, tuple(arguments(preset, folds, *flags, **small))))

    add("plain", ONE, "laptop-llama", *FIXED)
    add("one-micro-batch", OTHER, "laptop-llama", *FIXED, micro_batch_size=4)
    add("z", ONE, "laptop-llama", *FIXED, *Z)
    add("z-tp2", BOTH, "laptop-llama", *FIXED, *Z, *TP2, *SP)
    add("ramp", ONE, "laptop-gpt2", *RAMP, "--save-interval", 2)
    ramp = folder / "ramp" / manifests.folder_name(2)
    add("ramp-again", ONE, "laptop-gpt2", *RAMP, "--load", ramp)
    add("ramp-twice", OTHER, "laptop-gpt2", *RAMP, "--deterministic-mode")
    add("tied-pp2", BOTH, "laptop-gpt2", *PP2, *DISTRIBUTED, *TIMED)
    add("fp16-dp2", BOTH, "laptop-llama", "--fp16", *DISTRIBUTED, *FIXED,
        "--initial-loss-scale", 2.0**60, "--hysteresis", 1)  # fmt: skip
    add("sgd", ONE, "laptop-llama", *FIXED, "--optimizer", "sgd", "--log-interval", 2)
    add("packed", OTHER, "laptop-llama", *PACKED, micro_batch_size=4)
    add("packed-tp2", BOTH, "laptop-llama", *PACKED, *TP2, *SP, micro_batch_size=4, num_workers=1)
    add("packed-pp2", BOTH, "laptop-llama", *PACKED, *PP2, *UNIFORM, micro_batch_size=4)
    plain = [{**vars(job), "flags": [str(flag) for flag in job.flags]} for job in jobs]
    evaluations = arguments("laptop-llama", folds, *FIXED, "--load", folder / "plain",
                            "--eval-only", *TP2)  # fmt: skip
    output = run_ranks(train_and_evaluate, 2, plain, str(folder), evaluations)
    (folder / "eval-only.txt").write_text(output[0])
    return folder


def train_and_evaluate(jobs, folder, evaluation):
    """Run all jobs, then an evaluation; return the output of the evaluation."""
    from tests.support.training import train_on_rank

    train_on_rank(jobs, folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # Nothing may be written to the --save folder.
        train_on_rank([vars(Job("eval", BOTH, evaluation))], folder)
    return printed.getvalue()


def records(save):
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_are_averaged(runs):
    for value in ("lm loss", "grad norm", "params norm"):
        whole = history(runs / "one-micro-batch", value)
        assert len(whole) == 5
        assert_close(history(runs / "plain", value), whole, TRAINED, value)


def test_z_loss_is_logged_separately(runs):
    with_z, without = history(runs / "z"), history(runs / "plain")
    # The first two steps use the same weights: the warm-up starts with a learning rate of 0.
    assert [with_z[i] for i in (1, 2)] == [without[i] for i in (1, 2)]
    assert with_z[5] != without[5]
    z_loss = history(runs / "z", "z loss")
    assert z_loss[1] == pytest.approx(1e-3 * math.log(256) ** 2, rel=0.05)  # for small logits
    assert history(runs / "plain", "z loss") == {}
    for value in ("lm loss", "z loss", "grad norm", "params norm", "dataset loss/ja"):
        expected = history(runs / "z", value)
        assert expected
        assert_close(history(runs / "z-tp2", value), expected, TRAINED, value)


def test_ranks_save_together_by_time(runs):
    """At once, which is two iterations after the start or a save."""
    assert manifests.complete_iterations(runs / "tied-pp2") == [3, 5]


def test_ramp_up_and_a_restart_in_the_middle(runs):
    """Two folds of 2 iterations and one of 1, with batches of 2, 2, 4, 4 and 4 samples."""
    sizes = history(runs / "ramp", "global batch size")
    assert list(sizes.values()) == [2, 2, 4, 4, 4]
    consumed = history(runs / "ramp", "consumed tokens")
    assert list(consumed.values()) == [32 * samples for samples in (2, 4, 8, 12, 16)]
    folds = {r["iteration"]: r["fold"] for r in records(runs / "ramp") if r.get("event") == "fold"}
    assert folds == {1: "fold00", 3: "fold01", 5: "fold02"}
    for value in ("lm loss", "grad norm", "learning rate", "global batch size"):
        straight = history(runs / "ramp", value)
        assert history(runs / "ramp-again", value) == {i: straight[i] for i in (3, 4, 5)}, value
    assert history(runs / "ramp", "learning rate")[5] == 1e-3  # of the third fold
    losses = history(runs / "ramp")
    assert read_history(runs / "ramp").values("lm loss") == (list(losses), list(losses.values()))
    starts = [r for r in records(runs / "ramp-again") if r.get("event") == "start"]
    start = {"iteration": 2, "consumed samples": 4, "event": "start"}
    device = "CPU, 1 thread(s) per rank"
    assert starts == [start | {"hardware": f"1 x {device} on 1 node"}]
    manifest = manifests.read_manifest(manifests.newest_checkpoint(runs / "ramp"))
    assert (manifest.iteration, manifest.consumed_samples) == (5, 16)


def test_the_model_card_of_a_run(runs, tmp_path):
    """Folds of 4, 8 and 4 samples of 32 tokens, with shares 1:2, 3:1 and 1:1 of ja and en."""
    words = ["--to", "hf", "--input", runs / "ramp", "--output", tmp_path / "out", "--model-card"]
    assert convert_checkpoint([str(word) for word in words]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    folds = "fold00, fold01, fold02"
    assert f"|ja|{folds}|{32 * (1 + 6 + 2)}|\n|en|{folds}|{32 * (3 + 2 + 2)}|\n" in card
    assert "- **Hardware:** 1 x CPU, 1 thread(s) per rank on 1 node\n" in card
    assert "|Folds with their own learning rates|fold02|" in card
    losses = history(runs / "ramp")
    assert f"- **Training loss:** {losses[5]:.4f} at iteration 5\n" in card
    assert (tmp_path / "out" / "training_loss.png").is_file()


def test_remaining_time(runs):
    """The remaining samples at the throughput of the last interval, with batches of 2 and 4."""
    left = history(runs / "ramp", "seconds remaining")
    assert list(left) == [1, 2, 3, 4, 5] and left[5] == 0.0
    for value, after in (("ramp", (14, 12, 8, 4, 0)), ("ramp-again", (None, None, 8, 4, 0))):
        sizes = history(runs / value, "global batch size")
        seconds = history(runs / value, "seconds per iteration")
        for i, found in history(runs / value, "seconds remaining").items():
            assert found == pytest.approx(after[i - 1] / sizes[i] * seconds[i], rel=1e-9), i


def test_the_same_run_twice_is_the_same_bit_for_bit(runs):
    """With dropout, on another rank and after other runs."""
    for value in ("lm loss", "grad norm", "params norm"):
        assert history(runs / "ramp-twice", value) == history(runs / "ramp", value)


def test_losses_and_tokens_of_datasets(runs):
    found = [r for r in records(runs / "sgd") if "lm loss" in r]
    assert [r["iteration"] for r in found] == [1, 2, 4]  # the first, then every second one
    first, second, *_ = (
        {name: r[f"consumed tokens/{name}"] / 32 for name in ("ja", "en")} for r in found
    )
    record = found[1]  # iteration 2 only: 4 samples of equal length
    # The fold has 3 and 5 samples: en, ja, en, ja in iteration 1, then en, ja, en, en.
    expected = (record["dataset loss/ja"] + 3 * record["dataset loss/en"]) / 4
    assert (sum(first.values()), second) == (4, {"ja": 3, "en": 5})
    assert_close(record["lm loss"], expected, ELEMENTWISE, "lm loss")
    assert sum(second.values()) == record["consumed samples"] == 8


def test_documents_in_other_layouts(runs):
    """With data workers on both tensor-parallel ranks, and with recomputation on two stages."""
    for value in ("lm loss", "grad norm", "validation/valid"):
        expected = history(runs / "packed", value)
        assert distance(expected, history(runs / "one-micro-batch", value)) > 10 * TRAINED
        for name in ("packed-tp2", "packed-pp2"):
            assert_close(history(runs / name, value), expected, TRAINED, f"{name} {value}")


def test_parameter_norm(runs):
    """Tied embeddings, tensor-parallel and optimizer shards count each weight once."""
    for name in ("tied-pp2", "z-tp2", "plain"):
        weights = read_weights(manifests.newest_checkpoint(runs / name))
        total = sum(float(weight.double().square().sum()) for weight in weights.values())
        last = history(runs / name, "params norm")[5]
        assert_close(last, math.sqrt(total), ELEMENTWISE, name)


def test_fp16_finds_its_loss_scale(runs):
    losses, skipped = history(runs / "fp16-dp2"), history(runs / "fp16-dp2", "skipped iterations")
    scales = list(history(runs / "fp16-dp2", "loss scale").values())
    assert all(map(math.isfinite, losses.values()))
    assert sum(skipped.values()) > 0
    steps = [after / before for before, after in itertools.pairwise(scales)]
    assert steps == [0.5 if skipped[i] else 1.0 for i in range(2, 6)]
    assert losses[1] == pytest.approx(history(runs / "plain")[1], rel=1e-3)  # 11 bits of precision
    # A skipped step does not advance the learning rate, as in Megatron-LM.
    rates = list(history(runs / "fp16-dp2", "learning rate").values())
    assert rates[1] == (rates[0] if skipped[1] else 1e-3)


def test_eval_only(runs):
    """The losses equal those at the end of the run, in another layout; nothing is written."""
    printed = (runs / "eval-only.txt").read_text()
    assert " validation at iteration 5 | " in printed
    for name in ("valid", "tiny"):
        loss = history(runs / "plain", f"validation/{name}")[5]
        found = float(printed.split(f"{name} loss: ")[1].split(" |")[0])
        assert_close(found, loss, LOSS, name)
        assert history(runs / "plain", f"perplexity/{name}")[5] == pytest.approx(math.exp(loss))
    assert not (runs / "eval").exists()
    assert torch.cuda.is_available() or "MFU" not in (runs / "plain/metrics.jsonl").read_text()
