"""Parity with training loops of transformers and torch that share no code with the trainer.

Weights, samples and schedule are the same. Each loop implements Megatron's conventions: the loss is
the mean over micro-batches of the means over their masks, the warm-up counts from step 0, weight
decay is not applied to biases and norms. Masks are uneven, so that different averaging is detected.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_llmjp.convert import cli as converter
from tests.support.datasets import write_folds
from tests.support.tolerances import TRAINED, assert_close, distance
from tests.support.training import Job, arguments, history, train_all

STEPS, BATCH, MICRO, LENGTH, VOCABULARY = 50, 4, 2, 32, 128
LR, MIN_LR, WARMUP, DECAY = 4e-3, 4e-4, 5, 0.5
COMMON = {"vocab_size": VOCABULARY, "attention_dropout": 0.0}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}  # fmt: skip


def llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **COMMON, **SIZES, intermediate_size=64, num_key_value_heads=2, rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, n_inner=128,
        activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def gpt_neox(parallel: bool = False) -> transformers.PreTrainedModel:
    config = transformers.GPTNeoXConfig(
        **COMMON, **SIZES, intermediate_size=128, rotary_pct=0.5, hidden_act="gelu",
        use_parallel_residual=parallel, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def cosine(done: int) -> float:
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (done - WARMUP) / (STEPS - WARMUP))) / 2


def linear(done: int) -> float:
    return LR + (MIN_LR - LR) * (done - WARMUP) / (STEPS - WARMUP)


def wsd(done: int, tail: int = 20) -> float:
    part = max(0.0, (done - (STEPS - tail)) / tail)
    return MIN_LR + (LR - MIN_LR) * (1.0 - part)


WSD = ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", 20, "--lr-wsd-decay-style", "linear")
LINEAR = ("--lr-decay-style", "linear")
NO_DROPOUT = ("--hidden-dropout", 0, "--attention-dropout", 0)
STYLES = {
    # name: transformers' model, preset, ffn size, schedule flags, schedule as a function
    "llama": (llama, "laptop-llama", 64, WSD, wsd),
    "gpt2": (gpt2, "laptop-gpt2", 128, NO_DROPOUT, cosine),
    "neox": (gpt_neox, "laptop-gpt-neox", 128, LINEAR, linear),
    "neox-parallel": (
        partial(gpt_neox, parallel=True),
        "laptop-gpt-neox",
        128,
        (*LINEAR, "--use-parallel-residual"),
        linear,
    ),
}
SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "global_batch_size": BATCH,
    "micro_batch_size": MICRO, "lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": WARMUP,
    "lr_decay_iters": STEPS, "weight_decay": DECAY, "eval_iters": 0, "vocab_size": VOCABULARY,
}  # fmt: skip
MUTATED_STEPS = 15
MUTATED = ("tokens_weigh_alike", "everything_decays", "schedule_ahead")


def samples() -> dict[str, np.ndarray]:
    """Return sequences with a pattern, and masks of very different sizes."""
    generator = np.random.default_rng(11)
    count = STEPS * BATCH
    steps = generator.integers(1, 4, (count, LENGTH + 1))
    tokens = (generator.integers(VOCABULARY, size=(count, 1)) + np.cumsum(steps, 1)) % VOCABULARY
    mask = np.arange(LENGTH) < generator.integers(2, LENGTH + 1, (count, 1))
    positions = np.broadcast_to(np.arange(LENGTH), (count, LENGTH))
    return {
        "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask.astype(np.int64),
        "position_ids": positions,
    }  # fmt: skip


def independent(model: torch.nn.Module, schedule, data) -> tuple[list[float], list[float]]:
    """Return the losses and gradient norms of a plain training loop."""
    data = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.items()}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        rate = LR * step / WARMUP if step < WARMUP else schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total = count = 0.0
        for start in range(step * BATCH, (step + 1) * BATCH, MICRO):
            part = {name: array[start : start + MICRO] for name, array in data.items()}
            logits = model(part["tokens"]).logits.flatten(0, 1)
            each = torch.nn.functional.cross_entropy(
                logits, part["labels"].flatten(), reduction="none"
            )
            summed, tokens = (each * part["loss_mask"].flatten()).sum(), part["loss_mask"].sum()
            (summed / tokens / (BATCH // MICRO)).backward()
            total, count = total + summed.item(), count + float(tokens)
        losses.append(total / count)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
    return losses, norms


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    data, file = samples(), str(folder / "samples.npz")
    np.savez(file, **data)
    folds = write_folds(folder, (STEPS,), repeat=True)
    expected, jobs = {}, []
    for name, (make, preset, ffn, decay, schedule) in STYLES.items():
        torch.manual_seed(3)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():  # biases of 0 and norms of 1 hide errors
                parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder / f"{name}-hf")
        places = ("--input", folder / f"{name}-hf", "--output", folder / f"{name}-0")
        assert converter.main([str(word) for word in ("--to", "native", *places)]) == 0
        expected[name] = independent(model, schedule, data)
        flags = ("--load", folder / f"{name}-0", "--finetune", *decay)
        words = arguments(preset, folds, *flags, **SMALL, ffn_hidden_size=ffn)
        jobs.append(Job(name, (0, 1), tuple(words), samples=file))
        if name == "gpt2":
            words += ["--train-iters", str(MUTATED_STEPS)]
            jobs += [Job(name, (1, 2), tuple(words), name, file) for name in MUTATED]
    train_all(jobs, 2, folder)
    return folder, expected


def curves(folder: Path, name: str, losses: list[float], norms: list[float]):
    """Yield a run's losses and gradient norms with the expected ones."""
    for value, expected in (("lm loss", losses), ("grad norm", norms)):
        found = history(folder / name, value)
        assert list(found) == list(range(1, len(found) + 1))
        yield value, list(found.values()), expected[: len(found)]


@pytest.mark.parametrize("name", STYLES)
def test_losses_of_fifty_steps(runs, name):
    folder, expected = runs
    losses, _ = expected[name]
    assert len(history(folder / name)) == STEPS
    assert losses[-1] < losses[0] - 0.5  # the model learns
    for value, ours, theirs in curves(folder, name, *expected[name]):
        assert_close(ours, theirs, TRAINED, value)


@pytest.mark.parametrize("mutation", MUTATED)
def test_a_mutation_is_detected(runs, mutation):
    folder, expected = runs
    for value, ours, theirs in curves(folder, mutation, *expected["gpt2"]):
        assert distance(ours, theirs) > 10 * TRAINED, value
