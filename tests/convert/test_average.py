"""``--average``: the mean or exponential moving average of checkpoints."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import get_ema_avg_fn

from megatron_llmjp.checkpoint import manifest as manifests
from tests.convert.hf_models import gpt2, llama, state


def save_run(root, models, convert):
    """Write models as the checkpoints 10, 20, ... of a run."""
    for number, model in enumerate(models, 1):
        model.save_pretrained(root / "hf" / str(number))
        convert("--to", "native", "--input", root / "hf" / str(number), "--output", root / "one")
        rename_iteration(root / "one" / "iter_0000000", root / "run", 10 * number)
        shutil.rmtree(root / "one")
    return root / "run"


def rename_iteration(folder, run, iteration):
    """Move a native checkpoint to another iteration of a run."""
    run.mkdir(exist_ok=True)
    manifest = manifests.read_manifest(folder)
    final = folder.rename(run / manifests.folder_name(iteration))
    changes = {"iteration": iteration, "consumed_samples": 8 * iteration}
    manifests.write_manifest(final, manifest.model_copy(update=changes))
    return final


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_that_of_numpy(tmp_path, convert, dtype):
    models = [llama().to(dtype) for _ in range(3)]
    run = save_run(tmp_path, models, convert)
    three = 30, "iter_0000010", run / "iter_0000020"
    text = convert("--to", "hf", "--input", run, "--average", *three, "--output", tmp_path / "mean")
    assert (
        "mean of 3 checkpoints: iteration 10 x 0.3333, iteration 20 x 0.3333, iteration 30" in text
    )
    assert "weights only, no optimizer state" in text
    found = state(tmp_path / "mean")
    inputs = [state(tmp_path / "hf" / str(n)) for n in (1, 2, 3)]
    assert found.keys() == inputs[0].keys()
    for key, tensor in found.items():
        mean = np.mean([each[key].double().numpy() for each in inputs], axis=0)
        expected = torch.from_numpy(mean).to(dtype)
        assert tensor.dtype == dtype
        if dtype == torch.float32:  # accumulated in fp64, and rounded once
            assert torch.equal(tensor, expected), key
        else:  # accumulated in fp32: a tie may be rounded to the other neighbour
            different = tensor != expected
            assert different.float().mean() < 1e-3, key
            torch.testing.assert_close(tensor, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_moving_average_is_that_of_torch(tmp_path, convert):
    models = [llama() for _ in range(3)]
    run = save_run(tmp_path, models, convert)
    convert("--to", "native", "--input", run, "--average", 30, 10, 20, "--ema-decay", 0.7,
            "--output", tmp_path / "ema")  # fmt: skip
    convert("--to", "hf", "--input", tmp_path / "ema", "--output", tmp_path / "ema-hf")
    step = get_ema_avg_fn(0.7)
    inputs = [{k: v.double() for k, v in state(tmp_path / "hf" / n).items()} for n in "123"]
    for key, tensor in state(tmp_path / "ema-hf").items():
        first, second, third = (each[key] for each in inputs)
        expected = step(step(first, second, None), third, None).float()
        torch.testing.assert_close(tensor, expected, rtol=1.2e-7, atol=1e-9)  # one unit of fp32
    manifest = manifests.read_manifest(tmp_path / "ema" / "iter_0000030")
    assert (manifest.iteration, manifest.consumed_samples) == (30, 240)
    assert manifest.contents == "weights"


def test_a_requested_type_is_not_rounded_twice(tmp_path, convert):
    run = save_run(tmp_path, [llama().bfloat16() for _ in range(2)], convert)
    convert("--to", "hf", "--input", run, "--average", 10, 20, "--dtype", "fp32",
            "--output", tmp_path / "mean")  # fmt: skip
    inputs = [state(tmp_path / "hf" / n) for n in "12"]
    for key, tensor in state(tmp_path / "mean").items():
        assert torch.equal(tensor, (inputs[0][key].float() + inputs[1][key].float()) / 2), key


def test_errors(tmp_path, convert):
    run = save_run(tmp_path, [llama(), llama(rms_norm_eps=1e-6)], convert)
    gpt2().save_pretrained(tmp_path / "gpt2")
    llama().bfloat16().save_pretrained(tmp_path / "bf16")
    last = run / "iter_0000020"

    def refused(*words):
        return convert("--to", "native", "--output", tmp_path / "o", *words, code=2)

    assert "different models: norm_epsilon 3e-05 / 1e-06" in refused(
        "--average", run / "iter_0000010", last
    )
    assert "different models: num_attention_heads" in refused("--average", last, tmp_path / "gpt2")
    assert f"{last} is given twice" in refused("--average", last, run)
    assert "at least two" in refused("--average", last)
    assert "iter_0000030" in refused("--input", run, "--average", 20, 30)
    assert "--ema-decay requires --average" in refused("--input", last, "--ema-decay", 0.5)
    assert "between 0 and 1" in refused("--average", last, "--ema-decay", 1)
    other = tmp_path / "hf" / "1"
    assert "has type fp32 / bf16" in refused("--average", other, tmp_path / "bf16")
    pair = "--average", other, shutil.copytree(other, tmp_path / "hf" / "1b")
    assert "Adam's moments" in refused(*pair, "--with-optimizer")
    assert "not possible with --average" in refused(*pair, "--verify")
    inside = convert("--to", "hf", "--average", other, tmp_path / "hf" / "1b",
                     "--output", tmp_path / "hf" / "1b" / "o", code=2)  # fmt: skip
    assert "is inside the source" in inside
    assert not (tmp_path / "o").exists()
