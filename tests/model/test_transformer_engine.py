"""Training with Transformer Engine's layers, by a stand-in that computes with torch on a CPU.

Shown: loss, gradients, checkpoints and conversion are those of torch's layers in every parallel
layout of Transformer Engine's classes. Not shown: anything about the kernels of the real package,
such as their accuracy in fp32, because they need a GPU.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_llmjp.convert import cli as converter
from megatron_llmjp.parallel.launcher import free_port
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.proof import tensors
from tests.support.tolerances import LOSS, TRAINED, assert_close
from tests.support.training import DISTRIBUTED, SP, TP2, Job, arguments, history
from tests.support.with_transformer_engine import use_transformer_engine, work_on_rank
from tests.support.witness import read_tensors

FULL_RECOMPUTE = (
    "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1,
)  # fmt: skip
ARCHITECTURES = {
    "llama": ("laptop-llama", *SP),
    "gpt2": ("laptop-gpt2", *DISTRIBUTED, "--recompute-granularity", "selective"),
    "neox": ("laptop-gpt-neox", *SP, "--use-parallel-residual", *FULL_RECOMPUTE),
}
LAYERS = ("--num-layers", 2)
# Dropout of scores draws other numbers for a sequence of documents than for a batch.
RESET = ("--reset-attention-mask", "--reset-position-ids", "--attention-dropout", 0)
RUNS = {
    name + suffix: (*flags, *reset)
    for name, flags in ARCHITECTURES.items()
    for suffix, reset in (("", ()), ("-reset", RESET))
}
"""Preset and flags of the runs with and without Transformer Engine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs ``te/NAME`` and ``torch/NAME`` of 3 iterations, and what the one makes of the other."""
    folder = tmp_path_factory.mktemp("te")
    folds = write_folds(folder)

    def words(preset, *flags):
        options = (*TP2, "--padded-vocab-size", 256, "--train-iters", 3, "--eval-iters", 0, *LAYERS)
        return arguments(preset, folds, *options, *flags, micro_batch_size=2)

    def work(kind, names, copies=(), resumed=(), dense=(), installed=False):
        jobs = [(name, words(*RUNS[name], "--save-interval", 2)) for name in names]
        jobs += [(f"{name}-dense", words(*RUNS[name])) for name in dense]
        for name, source in resumed:
            flags = ("--finetune",) if source.name == "native" else ()
            jobs.append((name, words(*RUNS["llama"], "--load", source, *flags)))
        plain = [asdict(Job(f"{kind}/{name}", (0, 2), tuple(flags))) for name, flags in jobs]
        loads = {f"{kind}/{n}-copy": words(*RUNS[n], "--load", path) for n, path in copies}
        (folder / kind).mkdir(exist_ok=True)
        call = (plain, loads, str(free_port()), str(folder), kind == "te", not dense)
        run_ranks(work_on_rank, 2, *call, stand_ins=kind == "te" or installed)

    def saved(kind):
        return [(name, folder / kind / name / "iter_0000002") for name in ("llama", "gpt2")]

    work("te", RUNS)
    work("torch", RUNS, saved("te"), [("resumed", folder / "te/llama/iter_0000002")])
    for kind in ("te", "torch"):
        convert("hf", folder / kind / "llama", folder / kind / "hf")
    convert("native", folder / "torch/hf", folder / "native")
    converted = ("converted", folder / "native")
    resumed = ("resumed", folder / "torch/llama/iter_0000002")
    work("te", (), saved("torch"), [resumed, converted], dense=["llama-reset"])
    work("torch", (), (), [converted])
    work("cpu", ["gpt2"], installed=True)
    return folder


def convert(target: str, source: Path, output: Path, *flags: str) -> None:
    words = ["--to", target, "--input", source, "--output", output, *flags]
    assert converter.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_gradients_equal_those_of_torch(folder, name):
    expected, found = (history(folder / kind / name) for kind in ("torch", "te"))
    assert list(expected) == [1, 2, 3]
    assert_close(found[1], expected[1], LOSS, name)
    assert_close(found, expected, TRAINED, name)
    norms = [history(folder / kind / name, "grad norm") for kind in ("te", "torch")]
    assert_close(*norms, TRAINED, name)


def test_a_cpu_uses_torch_where_transformer_engine_is_installed(folder):
    """The stand-in's kernels fail without a GPU, as those of the original."""
    for value in ("lm loss", "grad norm"):
        found, expected = (history(folder / kind / "gpt2", value) for kind in ("cpu", "torch"))
        assert found == expected


def test_a_dense_mask_has_the_same_effect_as_boundaries(folder):
    """In fp32 Transformer Engine has no kernel for the boundaries of documents."""
    found, expected = (history(folder / "te" / f"llama-reset{kind}") for kind in ("-dense", ""))
    assert_close(found, expected, TRAINED, "dense")


@pytest.mark.parametrize("name", ["llama", "neox"])  # those without dropout
def test_attention_does_not_cross_documents(folder, name):
    """The runs with and without --reset-attention-mask differ by more than rounding."""
    masked, plain = (history(folder / "te" / run)[1] for run in (f"{name}-reset", name))
    assert abs(masked - plain) > 10 * LOSS * plain


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("source", "target"), [("te", "torch"), ("torch", "te")])
def test_checkpoints_load_with_other_layers(folder, source, target, name):
    """Weights and moments are bit-identical after loading and saving, on two ranks."""
    before, after = tensors(folder / source / name, 2), tensors(folder / target / f"{name}-copy")
    assert after.keys() == before.keys()
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in before) > 5
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize(("source", "target"), [("te", "torch"), ("torch", "te")])
def test_a_resumed_run_continues_the_curve(folder, source, target):
    expected = history(folder / source / "llama")
    found = history(folder / target / "resumed")
    assert list(found) == [3]
    assert_close(found, {i: expected[i] for i in found}, TRAINED, target)


def test_conversion_to_hugging_face_and_back(folder):
    """The checkpoints of both runs give the same model, and the model starts both kinds of run."""
    from safetensors.torch import load_file

    te, other = (load_file(folder / kind / "hf/model.safetensors") for kind in ("te", "torch"))
    assert te.keys() == other.keys() and len(te) > 10
    for name, tensor in other.items():
        assert_close(te[name], tensor, TRAINED, name)
    found, expected = (history(folder / kind / "converted") for kind in ("te", "torch"))
    assert_close(found, expected, TRAINED, "converted")
    assert found[1] < history(folder / "te/llama")[1]  # the weights are those of a trained model


def load_with_megatron_core(folder: str) -> bool:
    """Load Megatron-LM's formats as it does, with a strict check of all names."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_llmjp.config.loading import load_config, replace_fields
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import find_ranks

    use_transformer_engine()
    device, ranks = setup(), find_ranks()
    assert ranks is not None
    config = load_config(next(Path(folder).glob("native/iter_*/config.yaml")))
    config = replace_fields(config, tensor_model_parallel_size=2, padded_vocab_size=256)
    process_groups.initialize(config, ranks, device)
    (model,) = build_model(config, device)
    strict = dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    release = f"{folder}/dist/release"
    loaded = dist_checkpointing.load(model.sharded_state_dict(), release, strict=strict)
    model.load_state_dict({k: v for k, v in loaded.items() if "." in k})
    weights = [parameter.clone() for parameter in model.parameters()]
    rank = parallel_state.get_tensor_model_parallel_rank()
    file = f"{folder}/legacy/release/mp_rank_{rank:02d}/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)["model"]
    model.load_state_dict(content)
    process_groups.destroy()
    return all(map(torch.equal, weights, model.parameters()))


def test_megatron_core_loads_conversions_into_transformer_engine(folder):
    sizes = ("--target-tensor-parallel-size", "2")
    convert("megatron-lm", folder / "native", folder / "dist", *sizes)
    convert("megatron-lm", folder / "native", folder / "legacy", "--ckpt-format", "torch", *sizes)
    assert run_ranks(load_with_megatron_core, 2, str(folder), stand_ins=True) == [True, True]


def test_checkpoints_contain_no_extra_states(folder):
    from torch.distributed.checkpoint import FileSystemReader

    for kind in ("te", "torch"):
        stored = FileSystemReader(folder / kind / "llama/iter_0000003").read_metadata()
        assert not [key for key in stored.state_dict_metadata if "extra_state" in key]
    assert (
        read_tensors(folder / "te/llama/iter_0000003").keys()
        == read_tensors(folder / "torch/llama/iter_0000003").keys()
    )
