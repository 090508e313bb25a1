"""Training goes on from what other programs left: at TP2 x PP2, from the loss that they had.

Of Megatron-DeepSpeed's checkpoints that is the loss its own engine computed. With ZeRO's moments,
the steps that follow are those of transformers' model and torch's AdamW, given the same moments.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.convert import cli as converter
from megatron_llmjp.convert import hf_gpt2, megatron_deepspeed
from megatron_llmjp.convert.tensors import shapes
from tests.convert.hf_models import STYLES
from tests.support.datasets import write_folds
from tests.support.training import PP2, TP2, Job, history, train_all

FIXTURES = Path(__file__).parent / "fixtures"
GPT = "mds_gpt_tp2pp2dp2_bf16z1"
ENGINE = (GPT, "mds_llama_tp2pp2_fp32", "mds_gpt_nopipe_tp2")
DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer", "gpt_neox": "num_hidden_layers"}
STEPS, BATCH = 3, 2


def tokens_of(name: str) -> torch.Tensor:
    """Two sequences and the token after them, ``[2, s + 1]``."""
    if name in ENGINE:
        return torch.from_numpy(np.load(FIXTURES / name / "tokens.npy"))
    return torch.arange(BATCH * 33).view(BATCH, 33) * 7 % 101


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def convert(*words: object) -> None:
    assert converter.main([str(word) for word in words]) == 0


def job(folder: Path, name: str, tokens: torch.Tensor, steps: int, *flags: object) -> Job:
    """A run from ``folder/NAME-start`` whose every step sees the same batch."""
    rows = tokens.repeat(steps + 4, 1).numpy()
    arrays = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
    arrays["loss_mask"] = np.ones_like(rows[:, 1:])
    arrays["position_ids"] = np.arange(rows.shape[1] - 1) + 0 * rows[:, 1:]
    file = folder / f"{name}.npz"
    np.savez(file, **arrays)
    start = folder / f"{name}-start"
    words = ("--config", manifests.newest(start) / manifests.CONFIG, "--load", start, *TP2, *PP2,
             "--fold-file", folder / "folds.yaml", "--tokenizer-type", "NullTokenizer",
             "--seq-length", rows.shape[1] - 1, "--micro-batch-size", 1,
             "--global-batch-size", BATCH, "--log-interval", 1, "--eval-iters", 0,
             "--num-workers", 0, "--hidden-dropout", 0, "--attention-dropout", 0,
             "--tensorboard-dir", "", *flags)  # fmt: skip
    return Job(name, (0, 4), words, samples=str(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    write_folds(folder, (8,), repeat=True)
    jobs, once = [], ("--finetune", "--train-iters", 1)
    native = ("--to", "native", "--dtype", "fp32", "--target-tensor-parallel-size", 2)
    for name in ENGINE:
        convert(*native, "--input", FIXTURES / name / "ckpt", "--output", folder / f"{name}-start")
        jobs.append(job(folder, name, tokens_of(name), 1, *once))
    for name, make in STYLES.items():
        make(**{DEPTH[name]: 4}).save_pretrained(folder / f"{name}-hf")
        places = ("--input", folder / f"{name}-hf", "--output", folder / f"{name}-start")
        convert("--to", "native", *places)
        jobs.append(job(folder, name, tokens_of(name), 1, *once))
    places = ("--input", FIXTURES / GPT / "ckpt", "--output", folder / "moments-start")
    convert(*native, "--with-optimizer", *places)
    jobs.append(job(folder, "moments", tokens_of(GPT), STEPS, "--train-iters", 2 + STEPS))
    train_all(jobs, 4, folder)
    return folder


@pytest.mark.parametrize("name", ENGINE)
def test_the_loss_of_megatron_deepspeed(runs, name):
    expected = json.loads((FIXTURES / name / "expected.json").read_text())["eval_loss"]
    assert history(runs / name) == {1: pytest.approx(expected, abs=5e-6)}


@pytest.mark.parametrize("name", STYLES)
def test_the_loss_of_transformers(runs, name):
    """Rows that pad the vocabulary repeat the last one, and are in the softmax."""
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / f"{name}-hf").eval()
    tokens = tokens_of(name)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    padded = torch.cat([logits, logits[..., -1:].expand(*logits.shape[:-1], 128 - 101)], -1)
    expected = cross_entropy(padded, tokens).item()
    assert history(runs / name) == {1: pytest.approx(expected, abs=5e-6)}


def test_the_next_steps_have_the_moments(runs):
    places = ("--input", runs / "moments-start", "--output", runs / "moments-hf")
    convert("--to", "hf", "--keep-vocab-padding", *places)
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / "moments-hf").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for key, states in moments().items():
        optimizer.state[parameters[key]] = {"step": torch.tensor(2.0), **states}
    tokens, losses, norms = tokens_of(GPT), [], []
    for step in range(STEPS):
        rate = 1e-3 + (3e-3 - 1e-3) * (1 - (4 + BATCH * step) / 20)  # linear, over 20 samples
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1]).logits, tokens)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0).item())
        optimizer.step()
    iterations = range(3, 3 + STEPS)
    for value, expected in (("lm loss", losses), ("grad norm", norms)):
        found = history(runs / "moments", value)
        assert list(found) == list(iterations)
        assert list(found.values()) == pytest.approx(expected, rel=2e-6)
    assert losses[0] - losses[-1] > 0.1


def moments() -> dict[str, dict[str, torch.Tensor]]:
    """Both moments by transformers' names of the parameters, ``[out, in]`` as GPT-2 keeps them."""
    source = megatron_deepspeed.read(FIXTURES / GPT / "ckpt").check()
    state = source.optimizer()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for rule in hf_gpt2.STYLE.expanded(source.model):
        assert rule.name in shapes(source.model, 128)
        for kind in ("exp_avg", "exp_avg_sq"):
            parts = rule.layout(state.tensors[kind][rule.name].read(rule.name))
            for key, part in zip(rule.keys, parts, strict=True):
                tensor = part.view.reshape(part.shape).contiguous()
                found.setdefault(key, {})[kind] = tensor
    return found
