"""Conversion of AdamW's state from Megatron-LM to native."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.convert.formats.megatron_lm import reader as megatron_lm
from megatron_llmjp.convert.optimizer import optimizer_state
from tests.convert.megatron_parts import rank_parts
from tests.support.processes import ROOT
from tests.support.witness import read_tensors

REAL = ROOT / "tests" / "parity" / "fixtures" / "llama_small" / "iter_0000010"
RANK = Path("mp_rank_00", "model_optim_rng.pt")


def everything(path: Path) -> tuple[dict[str, torch.Tensor], optimizer_state.OptimizerState]:
    """Return all tensors of a Megatron-LM checkpoint: weights and optimizer state."""
    source = megatron_lm.read_megatron_lm(path).check()
    state = optimizer_state.read_optimizer_state(source)
    reads = {**source.reads, **optimizer_state.optimizer_reads(source, state, ConversionOptions())}
    return {name: read.read(name) for name, read in reads.items()}, state


@pytest.fixture(scope="module")
def expected():
    """Return the fixture's content, read with torch only; states are numbered across two groups."""
    content = torch.load(REAL / RANK, weights_only=False)
    weights = {k: v for k, v in content["model"].items() if torch.is_tensor(v)}
    state = content["optimizer"]["state"]
    names = sorted(weights, key=lambda name: weights[name].dim() == 1)  # a stable sort
    assert [tuple(state[i]["exp_avg"].shape) for i in state] == [weights[n].shape for n in names]
    for i, name in enumerate(names):
        weights |= {f"optimizer.state.{k}.{name}": state[i][k] for k in ("exp_avg", "exp_avg_sq")}
    return weights


def test_one_rank(expected):
    found, state = everything(REAL)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert state.step == 10
    assert state.scheduler["num_steps"] == 80
    assert [group["weight_decay"] for group in state.groups] == [0.1, 0.0]


def test_four_ranks(expected, tmp_path):
    """TP2 x PP2 in bf16 with separate fp32 weights, and another order of groups on each rank.

    Each rank's file is written like Megatron-LM's, from parts of the fixture.
    """
    content = torch.load(REAL / RANK, weights_only=False)
    for t in range(2):
        for p in range(2):
            own = {}
            for name in content["model"]:
                if name.endswith("_extra_state"):
                    continue
                if name.startswith("decoder.layers."):
                    number = int(name.split(".")[2])
                    if number // 2 != p:
                        continue
                    local = name.replace(f".{number}.", f".{number % 2}.", 1)
                elif (0 if name.startswith("embedding") else 1) != p:
                    continue
                else:
                    local = name
                own[local] = name
            save_rank(tmp_path / f"mp_rank_{t:02d}_{p:03d}" / RANK.name, content, own, expected, t)
    found, _ = everything(tmp_path)
    for name, tensor in expected.items():
        if name.startswith("optimizer."):
            assert torch.equal(found[name], tensor), name
        else:
            assert torch.equal(found[name], tensor.bfloat16()), name
            assert torch.equal(found[f"optimizer.state.param.{name}"], tensor), name


def save_rank(path, content, own, tensors, t):
    def part(prefix, local):
        name = own[local]
        return rank_parts(name, tensors[prefix + name], 2, swiglu=True)[t].clone()

    weights = {local: part("", local) for local in own}
    groups = [[n for n in own if weights[n].dim() == dims] for dims in (1, 2)]
    groups = groups[::-1] if t else groups
    numbers = {name: i for i, name in enumerate(groups[0] + groups[1])}
    states = {
        i: {k: part(f"optimizer.state.{k}.", name) for k in ("exp_avg", "exp_avg_sq")}
        for name, i in numbers.items()
    }
    inner = {
        "state": {i: {**state, "step": torch.tensor(10.0)} for i, state in states.items()},
        "param_groups": [
            {"wd_mult": float(weights[names[0]].dim() > 1), "params": [numbers[n] for n in names]}
            for names in groups
        ],
    }
    path.parent.mkdir(parents=True)
    optimizer = {
        "optimizer": inner,
        "fp32_from_fp16_params": [[weights[n] for n in names] for names in groups],
    }
    model = {name: weight.bfloat16() for name, weight in weights.items()}
    torch.save({**content, "model": model, "optimizer": optimizer}, path)


def test_torch_dist(expected, tmp_path, convert):
    """A native checkpoint with Megatron-LM's arguments is a Megatron-LM checkpoint."""
    convert("--to", "native", "--input", REAL, "--output", tmp_path / "n", "--with-optimizer")
    folder = tmp_path / "n" / manifests.folder_name(10)
    common = torch.load(folder / "common.pt", weights_only=False)
    args = torch.load(REAL / RANK, weights_only=False)["args"]
    torch.save({**common, "args": args}, folder / "common.pt")
    stored = read_tensors(folder)
    for kind in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
            assert torch.equal(stored[kind + name], expected[kind + name])
    found, state = everything(folder)
    main = {name for name in found if name.startswith("optimizer.state.param.")}
    assert found.keys() - main == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name.removeprefix("optimizer.state.param.")])
    assert state.step == 10
    # fp32 models have no separate main weights: three keys refer to the same bytes.
    entries = torch_dist.read_metadata(folder)
    name = "decoder.layers.mlp.linear_fc2.weight"
    places = [entries[f"{p}{name}"].chunks for p in ("", "optimizer.state.param.",
                                                     "optimizer.state.fp32_param.")]  # fmt: skip
    assert places[0] == places[1] == places[2]


def test_another_type_keeps_the_fp32_weights(expected, tmp_path, convert):
    convert("--to", "native", "--input", REAL, "--output", tmp_path / "n", "--with-optimizer",
            "--dtype", "bf16")  # fmt: skip
    stored = read_tensors(tmp_path / "n" / manifests.folder_name(10))
    for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
        assert torch.equal(stored[name], expected[name].bfloat16())
        assert stored[name].dtype == torch.bfloat16
        for kind in ("param", "fp32_param"):
            assert torch.equal(stored[f"optimizer.state.{kind}.{name}"], expected[name])


def test_unsupported_optimizer_state_is_named(tmp_path, convert):
    def output(change):
        folder = tmp_path / "source" / RANK.parent
        folder.mkdir(parents=True)
        content = torch.load(REAL / RANK, weights_only=False)
        change(content)
        torch.save(content, folder / RANK.name)
        words = ("--to", "native", "--input", folder.parent, "--output", tmp_path / "n")
        text = convert(*words, "--with-optimizer", code=2)
        convert(*words)  # the weights alone are supported
        shutil.rmtree(folder.parent)
        shutil.rmtree(tmp_path / "n")
        return text

    assert "--no-save-optim" in output(lambda content: content.pop("optimizer"))
    assert "distrib_optim.pt" in output(lambda content: content["optimizer"].pop("state"))
    assert "opt_param_scheduler" in output(lambda content: content.pop("opt_param_scheduler"))
    groups = "a parameter group has 17 states for 18 weights with weight decay"
    assert groups in output(lambda content: content["optimizer"]["param_groups"][0]["params"].pop())
