"""Training from converted checkpoints at TP2 x PP2, compared with the original programs.

The first loss is compared with the loss of Megatron-DeepSpeed's engine or transformers. With ZeRO's
moments, the next steps are compared with transformers' model and torch's AdamW, given the same
moments.
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
from megatron_llmjp.convert.formats import native
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.architectures import gpt2
from megatron_llmjp.convert.formats.megatron_deepspeed import reader as megatron_deepspeed
from tests.convert.hf_models import MODELS
from tests.support.datasets import write_folds
from tests.support.tolerances import (
    ELEMENTWISE,
    GRADIENT,
    GRADIENT_NORM,
    LOSS,
    assert_close,
)
from tests.support.training import PP2, TP2, Job, history, train_all

FIXTURES = Path(__file__).parent / "fixtures"
GPT = "mds_gpt_tp2pp2dp2_bf16z1"
ENGINE = (GPT, "mds_llama_tp2pp2_fp32", "mds_gpt_nopipe_tp2")
DEPTH = {name: "n_layer" if name == "gpt2" else "num_hidden_layers" for name in MODELS}
STEPS, BATCH = 3, 2


def tokens_of(name: str) -> torch.Tensor:
    """Return two sequences and their next token, ``[2, s + 1]``."""
    if name in ENGINE:
        return torch.from_numpy(np.load(FIXTURES / name / "tokens.npy"))
    return torch.arange(BATCH * 33).view(BATCH, 33) * 7 % 101


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def convert(*words: object) -> None:
    assert converter.main([str(word) for word in words]) == 0


def job(folder: Path, name: str, tokens: torch.Tensor, steps: int, *flags: object) -> Job:
    """Train from ``folder/NAME-start`` on the same batch in every step."""
    rows = tokens.repeat(steps + 4, 1).numpy()
    arrays = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
    arrays["loss_mask"] = np.ones_like(rows[:, 1:])
    arrays["position_ids"] = np.arange(rows.shape[1] - 1) + 0 * rows[:, 1:]
    file = folder / f"{name}.npz"
    np.savez(file, **arrays)
    start = folder / f"{name}-start"
    words = ("--config", manifests.newest_checkpoint(start) / manifests.CONFIG,
             "--load", start, *TP2, *PP2,
             "--fold-file", folder / "folds.yaml", "--tokenizer-type", "NullTokenizer",
             "--seq-length", rows.shape[1] - 1, "--micro-batch-size", 1,
             "--global-batch-size", BATCH, "--log-interval", 1, "--eval-iters", 0,
             "--num-workers", 0, "--hidden-dropout", 0, "--attention-dropout", 0,
             "--tensorboard-dir", "", *flags)  # fmt: skip
    return Job(name, (0, 4), words, samples=str(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    write_folds(folder, (8,), repeat=True, vocabulary=90)  # the smallest of the models
    jobs, once = [], ("--finetune", "--train-iters", 1)
    to_native = ("--to", "native", "--dtype", "fp32", "--target-tensor-parallel-size", 2)
    for name in ENGINE:
        places = ("--input", FIXTURES / name / "ckpt", "--output", folder / f"{name}-start")
        convert(*to_native, *places)
        jobs.append(job(folder, name, tokens_of(name), 1, *once))
    for name, make in MODELS.items():
        make(**{DEPTH[name]: 4}).save_pretrained(folder / f"{name}-hf")
        places = ("--input", folder / f"{name}-hf", "--output", folder / f"{name}-start")
        convert("--to", "native", *places)
        jobs.append(job(folder, name, tokens_of(name), 1, *once))
    places = ("--input", FIXTURES / GPT / "ckpt", "--output", folder / "moments-start")
    convert(*to_native, "--with-optimizer", *places)
    flags = ("--train-iters", 2 + STEPS, "--save-interval", 1)
    jobs.append(job(folder, "moments", tokens_of(GPT), STEPS, *flags))
    train_all(jobs, 4, folder)
    return folder


@pytest.mark.parametrize("name", ENGINE)
def test_the_loss_of_megatron_deepspeed(runs, name):
    expected = json.loads((FIXTURES / name / "expected.json").read_text())["eval_loss"]
    assert_close(history(runs / name), {1: expected}, LOSS, "loss")


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_transformers(runs, name):
    """The softmax includes the padding rows of the vocabulary, which repeat the last row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / f"{name}-hf").double()
    tokens = tokens_of(name)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    padded = torch.cat([logits, logits[..., -1:].expand(*logits.shape[:-1], 128 - 101)], -1)
    expected = cross_entropy(padded, tokens).item()
    assert_close(history(runs / name), {1: expected}, LOSS, "loss")


def test_the_next_steps_use_the_moments(runs):
    """Each step is compared with a step in fp64 from the previously saved state.

    Gradients are compared through the moments, and weights with the update by the saved moments: an
    update by recomputed moments would magnify the rounding of gradients near 0, and the error would
    accumulate.
    """
    places = ("--input", runs / "moments-start", "--output", runs / "moments-hf")
    convert("--to", "hf", "--keep-vocab-padding", *places)
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / "moments-hf").double().eval()
    parameters = dict(model.named_parameters())
    losses, norms = history(runs / "moments"), history(runs / "moments", "grad norm")
    assert list(losses) == list(range(3, 3 + STEPS))
    before, tokens = (
        state(megatron_deepspeed.read_megatron_deepspeed(FIXTURES / GPT / "ckpt")),
        tokens_of(GPT),
    )
    for step, iteration in enumerate(losses):
        for key, parameter in parameters.items():
            parameter.data.copy_(before["param"][key])
        model.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1]).logits, tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        assert_close(losses[iteration], loss.item(), LOSS, "loss")
        assert_close(norms[iteration], norm.item(), GRADIENT_NORM, "gradient norm")

        after = state(native.read_native(runs / "moments" / manifests.folder_name(iteration)))
        rate = 1e-3 + (3e-3 - 1e-3) * (1 - (4 + BATCH * step) / 20)  # linear, over 20 samples
        for key, parameter in parameters.items():
            gradient, decay = parameter.grad, 0.01 if parameter.dim() > 1 else 0.0
            first, second = (after[kind][key] for kind in ("exp_avg", "exp_avg_sq"))
            expected = 0.9 * before["exp_avg"][key] + 0.1 * gradient
            assert_close(first, expected, GRADIENT, "exp_avg")
            expected = 0.95 * before["exp_avg_sq"][key] + 0.05 * gradient**2
            assert_close(second, expected, GRADIENT, "exp_avg_sq")
            mean, root = first / (1 - 0.9**iteration), (second / (1 - 0.95**iteration)).sqrt()
            expected = parameter.data * (1 - rate * decay) - rate * mean / (root + 1e-8)
            assert_close(after["param"][key], expected, ELEMENTWISE, "weights")
        before = after
    assert losses[3] - losses[2 + STEPS] > 0.1


def state(source: SourceCheckpoint) -> dict[str, dict[str, torch.Tensor]]:
    """Return fp32 weights and both moments in fp64, with the names and layout of GPT-2."""
    tensors = {"param": source.check().reads, **source.optimizer().tensors}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for rule in gpt2.ARCHITECTURE.expanded_rules(source.model):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            parts = rule.layout(tensors[kind][rule.name].read(rule.name))
            for key, part in zip(rule.keys, parts, strict=True):
                found.setdefault(kind, {})[key] = part.view.reshape(part.shape).double()
    return found
