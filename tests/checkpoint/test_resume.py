"""Resumed runs: bit-identical in the same layout, within tolerance in another one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.run import resolve_run
from tests.support.datasets import VOCAB_SIZE, write_folds
from tests.support.proof import complete_iterations, tensors
from tests.support.tolerances import ELEMENTWISE, TRAINED, assert_close
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
from tests.support.witness import assert_files_match_manifest

CP2 = ("--context-parallel-size", 2)
MIDDLE, END = 2, 4
DROPOUT_RUN = (*TP2, *SP, *DISTRIBUTED, *OVERLAP)
BF16_RUN = (*PP2, *VP2, *DISTRIBUTED, "--bf16")
RAMP_RUN = ("--bf16", "--async-save", "--rampup-batch-size", 2, 2, 4, "--log-interval", 3)
"""Batches of 2, 2, 4 and 4: the save is in the middle of a fold and of a log interval."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of this file, trained in one world of four processes."""
    folder = tmp_path_factory.mktemp("resume")
    folds = write_folds(folder, (1, 2, 1))
    middle = manifests.folder_name(MIDDLE)
    jobs = []

    def add(name, ranks, preset, *flags, load=None, at=middle):
        if load is not None:
            flags = (*flags, "--load", folder / load / at, "--save-interval", END - 1)
        else:
            flags = (*flags, "--save-interval", MIDDLE)
        jobs.append(Job(name, ranks, tuple(arguments(preset, folds, *flags))))

    # gpt2 has dropout. The layouts differ in the state that a resume restores.
    add("alone", (0, 1), "laptop-gpt2")
    add("alone-again", (0, 1), "laptop-gpt2", "--num-workers", 1, load="alone")
    add("alone-watched", (1, 2), "laptop-gpt2", "--eval-interval", 1)
    add("bf16", (2, 4), "laptop-gpt2", *BF16_RUN)
    add("bf16-again", (2, 4), "laptop-gpt2", *BF16_RUN, load="bf16")
    add("dropout", (0, 4), "laptop-gpt2", *DROPOUT_RUN)
    add("dropout-again", (0, 4), "laptop-gpt2", *DROPOUT_RUN, load="dropout")
    add("ramp", (3, 4), "laptop-gpt2", *RAMP_RUN)
    add("ramp-again", (3, 4), "laptop-gpt2", *RAMP_RUN, load="ramp")
    # llama has no dropout, so that layouts can be compared.
    add("llama", (0, 4), "laptop-llama", *TP2, *PP2, *SP, *DISTRIBUTED)
    add("llama-pp2-dp2", (0, 4), "laptop-llama", *PP2, *DISTRIBUTED, load="llama")
    add("llama-pp2-vp2", (2, 4), "laptop-llama", *PP2, *VP2, *DISTRIBUTED, load="llama")
    add("llama-one", (0, 1), "laptop-llama", *DISTRIBUTED, load="llama")
    # From one layout to a second and a third, including the optimizer state.
    late = manifests.folder_name(END - 1)
    add("llama-dp4", (0, 4), "laptop-llama", *DISTRIBUTED, *OVERLAP, load="llama")
    add("llama-cp2-dp2", (0, 4), "laptop-llama", *CP2, *DISTRIBUTED, load="llama")
    add("llama-tp2-dp2", (0, 4), "laptop-llama", *TP2, *SP, *DISTRIBUTED,
        load="llama-cp2-dp2", at=late)  # fmt: skip
    add("llama-tp2", (0, 2), "laptop-llama", *TP2, *DISTRIBUTED, load="llama-pp2-vp2", at=late)
    add("plain", (0, 4), "laptop-llama", *TP2)
    add("plain-pp2-dp2", (0, 4), "laptop-llama", *PP2, load="plain")
    add("plain-one", (0, 1), "laptop-llama", load="plain-pp2-dp2", at=late)
    add("llama-finetuned", (1, 2), "laptop-llama", "--finetune",
        "--train-iters", 1, "--lr-decay-iters", END, load="llama")  # fmt: skip
    new = ("--lr", 1e-2, "--min-lr", 4e-3)
    add("llama-kept", (0, 1), "laptop-llama", *DISTRIBUTED, *new, load="llama")
    add("llama-overridden", (1, 2), "laptop-llama", *DISTRIBUTED, *new,
        "--override-opt-param-scheduler", load="llama")  # fmt: skip
    train_all(jobs, 4, folder)
    return folder


@pytest.mark.parametrize("name", ["alone", "bf16", "dropout"])
def test_same_layout_is_bit_identical(runs, name):
    before, after = history(runs / name), history(runs / f"{name}-again")
    assert list(after) == list(range(MIDDLE + 1, END + 1))
    assert after == {i: before[i] for i in after}
    norms = history(runs / name, "grad norm")
    assert history(runs / f"{name}-again", "grad norm") == {i: norms[i] for i in after}

    straight, resumed = tensors(runs / name), tensors(runs / f"{name}-again")
    assert straight.keys() == resumed.keys()
    moments = [key for key in straight if "exp_avg_sq" in key]
    parameters = [key for key in straight if not key.startswith("optimizer.")]
    assert len(moments) >= len(parameters) > 0
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key
    for key in parameters:
        # The optimizer's main weights, from which training continues.
        copy = straight.get(f"optimizer.state.param.{key}", straight[key])
        assert torch.equal(copy.to(straight[key].dtype), straight[key]), key
    for save in (runs / name, runs / f"{name}-again"):
        assert adam_steps(save) == {END}


def test_ramp_up_in_bf16_is_bit_identical(runs):
    """Without the distributed optimizer, from an asynchronous save."""
    middle = manifests.read_manifest(runs / "ramp" / manifests.folder_name(MIDDLE))
    assert (middle.consumed_samples, list(middle.folds)) == (4, ["fold00", "fold01"])
    norms, again = (history(runs / name, "grad norm") for name in ("ramp", "ramp-again"))
    assert again == {3: norms[3]}
    # The mean over iterations 2 (before the save) and 3.
    found, mean = history(runs / "ramp-again")[3], history(runs / "ramp")[3]
    assert_close(found, mean, ELEMENTWISE, "mean")
    straight, resumed = (tensors(runs / name) for name in ("ramp", "ramp-again"))
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key


def adam_steps(save: Path, iteration: int = END) -> set[int]:
    """Return the ``step`` of all parameter groups in ``common.pt``."""
    common = torch.load(save / manifests.folder_name(iteration) / "common.pt", weights_only=False)
    optimizer = common["optimizer"]
    groups = optimizer.get("param_groups") or optimizer["optimizer"]["param_groups"]
    return {int(group["step"]) for group in groups}


def test_validation_does_not_change_training(runs):
    """Validation does not use the random generators of training."""
    assert history(runs / "alone-watched") == history(runs / "alone")


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        *(("llama", layout) for layout in ("pp2-dp2", "pp2-vp2", "one", "dp4", "cp2-dp2")),
        *(("llama", layout) for layout in ("tp2-dp2", "tp2")),
        ("plain", "pp2-dp2"),
        ("plain", "one"),
    ],
)
def test_resume_in_another_layout(runs, source, layout):
    """With the distributed optimizer and, as ``plain``, without it."""
    before, save = history(runs / source), runs / f"{source}-{layout}"
    after = history(save)
    first = END if layout.startswith("tp2") or save.name == "plain-one" else MIDDLE + 1
    assert list(after) == list(range(first, END + 1))
    assert_close(after, {i: before[i] for i in after}, TRAINED, "loss")
    # TP 2 pads 100 tokens to 256, TP 1 to 128: the checkpoint's padding is kept.
    straight, resumed = tensors(runs / source), tensors(save)
    for folder, found in ((runs / source, straight), (save, resumed)):
        text = (folder / manifests.folder_name(END) / "config.yaml").read_text()
        assert yaml.safe_load(text)["model"]["padded_vocab_size"] == 256
        assert found["output_layer.weight"].shape == (256, 32)
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        assert_close(resumed[key], value, TRAINED, key)


def test_finetune_takes_weights_only(runs):
    """One step of a new run, with a learning rate of 0 by its warm-up."""
    assert list(history(runs / "llama-finetuned", "learning rate").values()) == [0.0]
    old, new = tensors(runs / "llama", MIDDLE), tensors(runs / "llama-finetuned", 1)
    for key in old:
        if not key.startswith("optimizer."):
            # A new run pads the vocabulary for its own layout: to 128, not 256.
            rows = VOCAB_SIZE if "word_embeddings" in key or "output_layer" in key else None
            assert torch.equal(new[key][:rows], old[key][:rows]), key
    assert adam_steps(runs / "llama-finetuned", 1) == {1}


def cosine(iteration: int, lr: float, min_lr: float, warmup: int = 2, end: int = END) -> float:
    """Return the learning rate of step ``iteration`` (from 1)."""
    done = iteration - 1
    if done <= warmup:
        return lr * done / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (end - warmup)))


def test_learning_rate_is_kept_or_overridden(runs):
    def rates(name):
        return history(runs / name, "learning rate")

    every, late = range(1, END + 1), range(MIDDLE + 1, END + 1)
    assert rates("llama") == pytest.approx({i: cosine(i, 2e-3, 2e-4) for i in every})
    assert rates("llama-kept") == {i: rates("llama")[i] for i in late}
    assert rates("llama-overridden") == pytest.approx({i: cosine(i, 1e-2, 4e-3) for i in late})
    assert history(runs / "llama-kept") == history(runs / "llama-one")
    assert history(runs / "llama-overridden") != history(runs / "llama-one")

    words = arguments("laptop-llama", runs / "folds.yaml", "--load", runs / "llama", "--lr", 1e-2)
    config = parse(words).config
    run = resolve_run(config, 1)
    assert run.config.optimizer.lr == 2e-3
    assert any(n.startswith("lr: the checkpoint's 0.002 is used, not 0.01") for n in run.notes)


def test_manifest_contents(runs):
    for save in (runs / "llama", runs / "llama-pp2-dp2"):
        assert complete_iterations(save)[-1] == END
        assert (save / "latest_checkpointed_iteration.txt").read_text() == f"{END}\n"
        content = assert_files_match_manifest(save / f"iter_{END:07d}")
        expected = {"format": "megatron_llmjp", "format_version": 1, "iteration": END,
                    "consumed_samples": END * 4, "contents": "full"}  # fmt: skip
        assert {key: content[key] for key in expected} == expected
        assert list(content["folds"]) == ["fold00", "fold01", "fold02"]
        assert content["metrics"]["lm loss"] == history(save)[END]
        common = torch.load(save / f"iter_{END:07d}" / "common.pt", weights_only=True)
        assert common["opt_param_scheduler"]["num_steps"] == END * 4
    middle = assert_files_match_manifest(runs / "llama" / f"iter_{MIDDLE:07d}")
    copy = yaml.safe_load((runs / "llama" / f"iter_{MIDDLE:07d}" / "folds.yaml").read_text())
    declared = yaml.safe_load((runs / "folds.yaml").read_text())
    for fold in declared["folds"]:
        for name, source in fold["blend"].items():
            source["path"] = str(runs / name)
            del source["repeat"]  # the default
    assert (copy["seed"], copy["folds"]) == (declared["seed"], declared["folds"])
    # Folds of 4 and 8 samples, with weights of 1 to 2 and 3 to 1.
    drawn = {
        (fold, name): (part["asked"], part["start"], part["samples"])
        for fold, record in middle["folds"].items()
        for name, part in record["datasets"].items()
    }
    assert drawn == {
        ("fold00", "ja"): ("weight 1", 0, 1), ("fold00", "en"): ("weight 2", 0, 3),
        ("fold01", "ja"): ("weight 3", 1, 6), ("fold01", "en"): ("weight 1", 3, 2),
    }  # fmt: skip
    config = load_config(runs / "llama" / manifests.folder_name(MIDDLE) / "config.yaml")
    assert config.model.activation_function == "swiglu"
