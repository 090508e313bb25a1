"""The choice between Transformer Engine's layers and torch's, and incomplete installations."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_llmjp import transformer_engine_import
from megatron_llmjp.config.flags import parse
from megatron_llmjp.errors import UserError
from megatron_llmjp.model import kernels, transformer_engine
from megatron_llmjp.model.attention import SDPAttention
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.placeholders import check_packages, substitute_missing

GPU, CPU = Device("cuda", "nccl", "a GPU"), Device("cpu", "gloo", "a CPU")
TRANSFORMER_ENGINE, LOCAL = (("--transformer-impl", i) for i in ("transformer_engine", "local"))

without_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="Transformer Engine is installed",
)


def config(*flags):
    return parse(["--config", "laptop-llama", "--vocab-size", "100", *flags]).config


@pytest.mark.parametrize(
    ("device", "installed", "flags", "expected"),
    [
        (GPU, True, (), True),
        (GPU, True, LOCAL, False),
        (GPU, True, TRANSFORMER_ENGINE, True),
        (GPU, False, (), False),
        (CPU, True, (), False),
        (CPU, True, LOCAL, False),
    ],
)
def test_the_layers_that_are_used(monkeypatch, device, installed, flags, expected):
    monkeypatch.setattr(kernels.gpt_layer_specs, "HAVE_TE", installed)
    monkeypatch.setattr(kernels, "compiler_error", lambda: "")
    choice = kernels.choose_kernels(device, config(*flags))
    assert choice.transformer_engine is expected and choice.fusions is device.is_cuda
    assert str(choice).startswith("Transformer Engine" if expected else "SDPA")
    assert choice.fused_wgrad == (expected or choice.apex)


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [(CPU, True, "needs a GPU, and this is a CPU"), (GPU, False, "is not installed")],
)
def test_a_request_that_cannot_be_met_is_refused(monkeypatch, device, installed, message):
    monkeypatch.setattr(kernels.gpt_layer_specs, "HAVE_TE", installed)
    with pytest.raises(UserError, match=message):
        kernels.choose_kernels(device, config(*TRANSFORMER_ENGINE))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "flash_attn", "torch_kernel", "expected"),
    [
        (GPU, torch.bfloat16, (9, 0), False, True, ("TE", True)),  # cuDNN's, on Hopper
        (GPU, torch.float16, (8, 0), True, True, ("TE", True)),  # flash-attn's, on Ampere
        (GPU, torch.bfloat16, (8, 0), False, True, ("torch", True)),
        (GPU, torch.bfloat16, (8, 0), False, False, ("TE", False)),
        (GPU, torch.float32, (9, 0), True, False, ("TE", False)),
        (CPU, torch.bfloat16, (9, 0), True, True, ("TE", False)),
    ],
)
def test_attention_within_documents(
    monkeypatch, device, dtype, capability, flash_attn, torch_kernel, expected
):
    module = transformer_engine
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(module, "find_spec", lambda _: object() if flash_attn else None)
    monkeypatch.setattr(module, "has_document_kernel", lambda *_: torch_kernel)
    attention, accepts_boundaries = module.choose_document_attention(
        SimpleNamespace(context_parallel_size=1), dtype, device
    )
    classes = {"TE": module.DocumentAttention, "torch": SDPAttention}
    assert (attention, accepts_boundaries) == (classes[expected[0]], expected[1])


@without_transformer_engine
def test_a_run_is_planned_without_transformer_engine_and_not_started():
    requested = config(*TRANSFORMER_ENGINE, "--tokenizer-type", "NullTokenizer")
    planned = substitute_missing(requested)
    assert planned.config.training.transformer_impl is None
    assert "Transformer Engine is not installed here; the run needs it" in planned.notes
    assert planned.restored(planned.config) == requested
    with pytest.raises(UserError, match="needs Transformer Engine, which is not installed"):
        check_packages(requested)


@without_transformer_engine
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"__init__": "raise RuntimeError('cudnn shared object not found.')"},
         r"RuntimeError: cudnn shared object not found\. Either install all of it, after torch"),
        ({"__init__": "", "pytorch": "raise FileNotFoundError('no shared object file')"},
         "FileNotFoundError: no shared object file"),
        ({"__init__": "", "pytorch": "raise ImportError('undefined symbol: x')"},
         "ImportError: undefined symbol: x"),
        ({}, "ModuleNotFoundError: No module named 'transformer_engine.pytorch'"),
    ],
)  # fmt: skip
def test_an_incomplete_installation_is_one_message(monkeypatch, tmp_path, files, message):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (finder,) = (f for f in sys.meta_path if isinstance(f, transformer_engine_import._ImportCheck))
    finder.find_spec("megatron", None)
    try:
        with pytest.raises(UserError, match=message) as error:
            finder.find_spec("megatron.core", None)
    finally:
        sys.modules.pop("transformer_engine", None)
    assert "pip install --no-build-isolation 'transformer-engine[pytorch]'" in str(error.value)
    assert "pip uninstall transformer-engine transformer-engine-cu12" in str(error.value)


@without_transformer_engine
def test_nothing_is_checked_without_transformer_engine():
    transformer_engine_import.check_transformer_engine()


@without_transformer_engine
def test_the_message_names_the_missing_packages(monkeypatch, tmp_path):
    for name in ("transformer_engine", "transformer_engine_cu12"):
        folder = tmp_path / f"{name}-2.20.2.dist-info"
        folder.mkdir()
        title = name.replace("_", "-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title}\nVersion: 2.20.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert transformer_engine_import._installed() == (
        "transformer-engine 2.20.2, transformer-engine-cu12 2.20.2; missing: "
        "transformer-engine-torch"
    )
