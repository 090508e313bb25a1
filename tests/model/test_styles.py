"""The three architectures against transformers, torch and published sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    load_config,
    read_config,
    replace_fields,
)
from megatron_llmjp.convert import cli as converter
from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, LOGITS, assert_close, assert_within, distance

SIZES = {
    # Parameters without word embeddings and output layer, or all of them.
    "llm-jp-3-1.8b": ("rest", 1_459_718_144),
    "llm-jp-3-3.7b": ("rest", 3_171_068_928),
    "llm-jp-3-13b": ("rest", 12_688_184_320),
    "llm-jp-3-172b": ("rest", 169_947_181_056),
    "llm-jp-1.3b-v1.0": ("all", 1_316_605_952),
    "llm-jp-13b-v1.0": ("all", 12_855_592_960),
}
ROWS = 50_688
"""Padded vocabulary size of the two models of which all parameters are counted."""

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101}


def llama(**rope: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=176, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=64, n_inner=256, vocab_size=101,
        activation_function="gelu_new",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def gpt_neox(parallel: bool = False) -> transformers.PreTrainedModel:
    config = transformers.GPTNeoXConfig(
        **SMALL, intermediate_size=256, max_position_embeddings=64, rotary_pct=0.5,
        use_parallel_residual=parallel, hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


STYLES = {"laptop-llama": llama, "laptop-gpt2": gpt2, "laptop-gpt-neox": gpt_neox}
LLAMA3 = {
    "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
VARIANTS = {
    **STYLES,
    "llama-linear": partial(llama, rope_type="linear", factor=4.0),
    "llama-3": partial(llama, rope_type="llama3", **LLAMA3),
    "llama-base": partial(llama, rope_theta=500_000.0),
    "neox-parallel": partial(gpt_neox, parallel=True),
}
"""The architectures and their variants."""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Results of one process of megatron-core, and logits of transformers' models."""
    folder = tmp_path_factory.mktemp("styles")
    theirs = {}
    tokens = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(3))
    torch.save(tokens, folder / "tokens.pt")
    for name, make in VARIANTS.items():
        torch.manual_seed(5)
        model = make().eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # so that a missing bias or a permuted norm is detected
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            theirs[name] = model(tokens).logits
        model.save_pretrained(folder / f"{name}-hf")
        words = ["--to", "native", "--input", folder / f"{name}-hf", "--output", folder / name]
        assert converter.main([str(word) for word in words]) == 0
    (found,) = run_ranks(compute, 1, str(folder), list(VARIANTS), list(SIZES))
    return folder, theirs, found


def compute(root: str, styles: list[str], presets: list[str]) -> dict[str, Any]:
    """Compute in a separate process: the replaced torch.cuda must not affect transformers."""
    from megatron_llmjp.checkpoint import sharded_state
    from megatron_llmjp.checkpoint.manifest import newest_checkpoint
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process

    folder, device = Path(root), setup()
    tokens = torch.load(folder / "tokens.pt")
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    found: dict[str, Any] = {}
    for number, style in enumerate(styles):
        config = load_config(newest_checkpoint(folder / style) / "config.yaml")
        config = replace_fields(config, micro_batch_size=2, global_batch_size=2, seq_length=32)
        if number == 0:
            process_groups.initialize(config, single_process(), device)
        (model,) = build_model(config, device)
        sharded_state.load_checkpoint(
            newest_checkpoint(folder / style), sharded_state.RunState([model])
        )
        with torch.no_grad():
            torch.save(model.eval()(tokens, positions, None), folder / f"{style}.pt")
            found[f"leak {style}"] = leak(model, tokens)
        if style in ("laptop-gpt2", "laptop-gpt-neox"):
            found[f"gelu {style}"] = activation_errors(model)
    found["interleaved"] = communication(config, device)
    for name in presets:
        found[name] = count(name)
    return found


def leak(model: Any, tokens: torch.Tensor) -> list[float]:
    """Return the effect of one packed document on the logits of the next, with and without mask."""
    other = tokens.clone()
    other[:, :10] = (other[:, :10] + 1) % 101
    length = tokens.shape[1]
    segment = (torch.arange(length) >= 10).long()
    positions = (torch.arange(length) - 10 * segment).expand_as(tokens)
    boundaries = torch.tensor([0, 10, 32, 42, 64], dtype=torch.int32)
    changes = []
    for documents in (boundaries, None):
        one, two = (model(x, positions, documents)[:, 10:] for x in (tokens, other))
        changes.append(float((one - two).abs().max()))
    return changes


def activation_errors(model: Any) -> list[float]:
    """Relative distance of a feed-forward layer from torch's tanh and erf GELU."""
    mlp = model.decoder.layers[0].mlp
    x = 3 * torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(1))
    output, bias = mlp(x)
    errors = []
    for kind in ("tanh", "none"):
        inner = F.linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
        expected = F.linear(F.gelu(inner, approximate=kind), mlp.linear_fc2.weight)
        errors.append(float((output - expected).abs().max() / expected.abs().max()))
    assert torch.equal(bias, mlp.linear_fc2.bias)
    return errors


def communication(config: Any, device: Any) -> list[list[bool]]:
    """Return communication settings for two stages, three stages, and two on a GPU."""
    from megatron_llmjp.model import gpt
    from megatron_llmjp.parallel.device import Device

    found = []
    for stages, where in ((2, device), (3, device), (2, Device("cuda", "nccl", "a GPU"))):
        sizes = {"pipeline_model_parallel_size": stages, "virtual_pipeline_model_parallel_size": 2}
        settings = gpt._pipeline_communication(replace_fields(config, **sizes), where)
        names = ("overlap_p2p_comm", "batch_p2p_comm", "batch_p2p_sync")
        found.append([settings[name] for name in (*names, "deallocate_pipeline_outputs")])
    return found


class Nowhere:
    """The meta device."""

    is_cuda = False
    torch = torch.device("meta")


def count(preset: str) -> list[int]:
    """Count a preset's parameters: all, and those of word embeddings and output layer."""
    from megatron_llmjp.model import gpt

    layers = ConfigLayers()
    read_config(preset, layers)
    rows = ROWS if SIZES[preset][0] == "all" else 99_584
    one = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    config = replace_fields(
        build_config(layers), padded_vocab_size=rows, bf16=False, fp16=False, **one
    )
    before = torch.cuda.current_device, gpt.initialize
    torch.cuda.current_device = lambda: Nowhere.torch  # type: ignore[assignment,return-value]
    gpt.initialize = lambda *_: None
    try:
        with Nowhere.torch:
            (model,) = gpt.build_model(config, Nowhere())  # type: ignore[arg-type]
    finally:
        torch.cuda.current_device, gpt.initialize = before
    named = dict(model.named_parameters())
    assert all(p.is_meta for p in named.values())
    words = [p.numel() for n, p in named.items() if "word_embeddings" in n or "output_layer" in n]
    return [sum(p.numel() for p in named.values()), sum(words)]


@pytest.mark.parametrize("style", VARIANTS)
def test_logits_equal_transformers(result, style):
    folder, theirs, _ = result
    ours = torch.load(folder / f"{style}.pt")[..., :101]
    assert float(theirs[style].abs().max()) > 0.5
    assert_close(ours, theirs[style], LOGITS, style)
    if style not in STYLES:  # the same weights without the variant's change
        plain = theirs["laptop-llama" if "llama" in style else "laptop-gpt-neox"]
        assert distance(plain, theirs[style]) > 10 * LOGITS
        return
    # The model has the preset's architecture in everything but size.
    layers = ConfigLayers()
    read_config(style, layers)
    preset = build_config(layers).model
    config = load_config(next((folder / style).glob("iter_*")) / "config.yaml").model
    for field in (
        "position_embedding_type", "rotary_percent", "rotary_base", "normalization",
        "use_rope_scaling", "use_parallel_residual", "norm_epsilon", "activation_function",
        "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(preset, field), field


def test_both_gelus(result):
    """llm-jp v1.0 was trained with the tanh approximation, GPT-NeoX with the exact one."""
    _, _, found = result
    tanh, erf = found["gelu laptop-gpt2"]
    assert_within(tanh, ELEMENTWISE, "tanh")
    assert erf > 10 * ELEMENTWISE
    tanh, erf = found["gelu laptop-gpt-neox"]
    assert_within(erf, ELEMENTWISE, "erf")
    assert tanh > 10 * ELEMENTWISE


@pytest.mark.parametrize("style", VARIANTS)
def test_packed_documents_are_masked(result, style):
    masked, unmasked = result[2][f"leak {style}"]
    assert masked == 0.0 and unmasked > 0.01


def test_pipeline_communication(result):
    """Interleaved stages overlap individual sends, no send waits, gloo's buffers are not freed."""
    assert result[2]["interleaved"] == [
        [True, False, False, False],
        [True, False, False, False],
        [True, False, False, True],
    ]


@pytest.mark.parametrize("preset", SIZES)
def test_sizes_of_presets(result, preset):
    everything, words = result[2][preset]
    what, expected = SIZES[preset]
    assert everything - (words if what == "rest" else 0) == expected
