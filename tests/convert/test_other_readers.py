"""Exports as vLLM and llama.cpp read them: configuration keys, tensor names, a generated text.

The lists are those of the loaders, read in November 2026:
- vLLM: vllm/model_executor/models/llama.py, gpt2.py, gpt_neox.py (``load_weights`` and attributes
  of the configuration without a default);
- llama.cpp: conversion/base.py, llama.py, gpt2.py, gptneox.py (``hparams[...]``), and the table of
  tensor names in its package gguf.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers

from tests.convert.hf_models import MODELS, llama, state

BOTH = "hidden_size num_attention_heads num_hidden_layers vocab_size tie_word_embeddings"
VLLM_ATTRIBUTES = {
    "llama": f"{BOTH} intermediate_size hidden_act rms_norm_eps num_key_value_heads head_dim "
    "rope_parameters max_position_embeddings attention_bias mlp_bias",
    "qwen3": f"{BOTH} intermediate_size hidden_act rms_norm_eps num_key_value_heads head_dim "
    "rope_parameters max_position_embeddings attention_bias",
    "gpt2": f"{BOTH} activation_function n_inner n_embd layer_norm_epsilon add_cross_attention "
    "max_position_embeddings scale_attn_by_inverse_layer_idx reorder_and_upcast_attn",
    "gpt_neox": f"{BOTH} intermediate_size hidden_act layer_norm_eps use_parallel_residual "
    "rope_parameters max_position_embeddings attention_bias",
}
VLLM_TENSORS = {
    "llama": r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight|model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)\.weight",
    "qwen3": r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight|model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|self_attn\.[qk]_norm|mlp\.(gate|up|down)_proj|"
    r"(input|post_attention)_layernorm)\.weight",
    "gpt2": r"transformer\.(wte|wpe)\.weight|transformer\.(ln_f|h\.\d+\."
    r"(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))\.(weight|bias)",
    "gpt_neox": r"gpt_neox\.embed_in\.weight|embed_out\.weight|gpt_neox\.(final_layer_norm|"
    r"layers\.\d+\.(input_layernorm|post_attention_layernorm|attention\.(query_key_value|dense)|"
    r"mlp\.dense_(h_to_4h|4h_to_h)))\.(weight|bias)",
}
LLAMA_CPP_KEYS = {
    "llama": "num_hidden_layers max_position_embeddings hidden_size intermediate_size vocab_size "
    "num_attention_heads num_key_value_heads rms_norm_eps rope_theta head_dim",
    "qwen3": "num_hidden_layers max_position_embeddings hidden_size intermediate_size vocab_size "
    "num_attention_heads num_key_value_heads rms_norm_eps rope_theta head_dim",
    "gpt2": "n_layer n_ctx n_embd n_head layer_norm_epsilon vocab_size",
    "gpt_neox": "num_hidden_layers max_position_embeddings hidden_size intermediate_size "
    "rotary_pct num_attention_heads use_parallel_residual layer_norm_eps vocab_size",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}
CHANGES = {"gpt2": {"n_inner": None}}
"""llama.cpp computes the feed-forward size of GPT-2 as 4 x n_embd."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Export each architecture from its native checkpoint."""
    from megatron_llmjp.convert.cli import main

    root = tmp_path_factory.mktemp("exports")
    for name, build in MODELS.items():
        build(**CHANGES.get(name, {})).save_pretrained(root / f"{name}-hf")
        for before, target, after in (
            (f"{name}-hf", "native", f"{name}-native"),
            (f"{name}-native", "hf", name),
        ):
            words = ["--to", target, "--input", root / before, "--output", root / after]
            assert main([str(word) for word in words]) == 0
    return root


@pytest.mark.parametrize("name", MODELS)
def test_vllm_finds_its_attributes_and_tensors(exports, name):
    config = transformers.AutoConfig.from_pretrained(exports / name)
    assert config.architectures == [CLASSES[name]]
    missing = [key for key in VLLM_ATTRIBUTES[name].split() if not hasattr(config, key)]
    assert missing == []
    assert config.dtype == torch.float32
    if name == "llama":
        assert config.hidden_act == "silu"  # the only one that vLLM accepts
        assert config.rope_parameters["rope_theta"] == 5000.0
    keys = state(exports / name)
    assert [key for key in keys if not re.fullmatch(VLLM_TENSORS[name], key)] == []


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_finds_its_keys(exports, name):
    config = json.loads((exports / name / "config.json").read_text())
    assert config["architectures"] == [CLASSES[name]]
    wrong = [key for key in LLAMA_CPP_KEYS[name].split() if config.get(key) is None]
    assert wrong == []
    if name == "gpt2":
        assert config["n_inner"] == 4 * config["n_embd"]


def test_llama_cpp_finds_the_original_length_of_llama3_scaling(tmp_path, convert):
    """conversion/llama.py reads it from the top level, where its default is 8192."""
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 40}  # fmt: skip
    llama(rope_parameters=scaling).save_pretrained(tmp_path / "hf")
    convert("--to", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["original_max_position_embeddings"] == 40
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert found["original_max_position_embeddings"] == 40


@pytest.mark.parametrize("name", MODELS)
def test_gguf_has_a_name_for_every_tensor(exports, name):
    gguf = pytest.importorskip("gguf", reason="llama.cpp's package gguf is not installed")
    kind = {"llama": "LLAMA", "gpt2": "GPT2", "gpt_neox": "GPTNEOX"}[name]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind), 3)
    found = {key: names.get_name(key, (".weight", ".bias")) for key in state(exports / name)}
    assert [key for key, other in found.items() if other is None] == []
    assert len(set(found.values())) == len(found)
