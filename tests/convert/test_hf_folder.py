"""Hugging Face folders: files, keys of older versions, and models that cannot be exported."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_llmjp.convert.formats.hugging_face.architectures.registry import (
    ARCHITECTURES,
    architecture_for,
)
from megatron_llmjp.convert.formats.hugging_face.folder import read_hugging_face
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import MODELS
from tests.convert.megatron_parts import LLAMA_KIN
from tests.convert.test_hf_native import OTHER

SMALL = {
    "llama": {"num_hidden_layers": 1, "intermediate_size": 16},
    "gpt2": {"n_layer": 1, "n_inner": 16},
    "gpt_neox": {"num_hidden_layers": 1, "intermediate_size": 16},
    "qwen3": {"num_hidden_layers": 1, "intermediate_size": 16},
}
MASK = torch.ones(1, 1, 4, 4, dtype=torch.bool)
BUFFERS = {
    # of transformers 4, which stored them with the parameters
    "llama": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.rotary_emb.inv_freq": torch.ones(6),
    },
    "gpt2": {
        "transformer.h.0.attn.bias": MASK,
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": MASK,
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    },
    "qwen3": {"model.rotary_emb.inv_freq": torch.ones(6)},
}
STRANGE = {
    "llama": "model.layers.0.self_attn.q_norm.weight",
    "gpt2": "transformer.h.0.attn.bias_table",
    "gpt_neox": "gpt_neox.layers.0.attention.rotary_emb.inv_freq_scale",
    "qwen3": "model.layers.0.self_attn.q_proj.bias",
}


@pytest.mark.parametrize("architecture", MODELS)
def test_buffers_of_older_versions_are_ignored(tmp_path, architecture):
    """In sharded files of torch; other unknown tensors may change the logits and are refused."""
    model = MODELS[architecture](**SMALL[architecture])
    model.config.save_pretrained(tmp_path)
    tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if architecture not in LLAMA_KIN:  # in transformers 5 the head of GPT-NeoX has another key
        tensors = {key.replace("lm_head", "embed_out"): value for key, value in tensors.items()}
    if model.config.tie_word_embeddings:
        tensors = {key: t for key, t in tensors.items() if "embed_out" not in key}
    names = sorted([*tensors, *BUFFERS[architecture]])
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    contents = tensors | BUFFERS[architecture]

    def write() -> None:
        for shard in set(places.values()):
            own = {name: contents[name] for name, place in places.items() if place == shard}
            torch.save(own, tmp_path / shard)
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    write()
    source = read_hugging_face(tmp_path)
    found = [part.read() for read in source.reads.values() for part in read.parts]
    assert len(found) == len(tensors)
    assert sum(t.double().sum() for t in found) == pytest.approx(
        float(sum(t.double().sum() for t in tensors.values()))
    )
    places[STRANGE[architecture]] = "pytorch_model-00001-of-00002.bin"
    contents[STRANGE[architecture]] = torch.ones(2)
    write()
    with pytest.raises(UserError, match=f"unexpected: {STRANGE[architecture]}"):
        read_hugging_face(tmp_path)


def test_missing_files_are_named(tmp_path):
    model = MODELS["gpt2"](**SMALL["gpt2"])
    model.config.save_pretrained(tmp_path)

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            read_hugging_face(tmp_path)
        return str(caught.value)

    assert f"{tmp_path}: no weights found; expected model.safetensors, model.saf" in refusal()
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path.parent / "a.safetensors").write_bytes(b"")
    for place, message in (
        ("a.safetensors", f"{tmp_path}: a.safetensors, listed in the index, is missing"),
        ("../a.safetensors", f"{index}: damaged: '../a.safetensors' is not the name of a file"),
    ):
        index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": place}}))
        assert message in refusal()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert' is not supported; supported: llama, gpt2, gpt_neox" in refusal()


NEITHER = {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}
UNSUPPORTED = {
    # fields of the model, and the feature that is named
    "llama": [
        ({"position_embedding_type": "learned_absolute"}, "learned position embeddings"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"normalization": "LayerNorm"}, "normalization LayerNorm"),
        ({"activation_function": "gelu"}, "activation gelu"),
        ({"use_parallel_residual": True}, "parallel residual"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        (NEITHER, "use_rope_scaling with rotary_seq_len_interpolation_factor"),
    ],
    "gpt2": [
        ({"position_embedding_type": "rope"}, "rotary position embeddings"),
        ({"use_parallel_residual": True}, "parallel residual"),
        ({"normalization": "RMSNorm"}, "normalization RMSNorm"),
        ({"activation_function": "swiglu"}, "activation swiglu"),
        ({"add_bias_linear": False}, "linear layers without biases"),
        ({"num_query_groups": 2}, "2 query groups of 8 heads"),
        ({"kv_channels": 12}, "heads of size 12"),
        ({"qk_layernorm": True}, "qk_layernorm"),
    ],
    "gpt_neox": [
        ({"position_embedding_type": "yarn"}, "position_embedding_type yarn"),
        (NEITHER, "use_rope_scaling with rotary_seq_len_interpolation_factor"),
        ({"normalization": "RMSNorm"}, "normalization RMSNorm"),
        ({"add_bias_linear": False}, "linear layers without biases"),
    ],
    "qwen3": [
        ({"qk_layernorm": False}, "models without qk_layernorm"),
        ({"add_bias_linear": True}, "biases in linear layers"),
    ],
}


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_models_that_an_architecture_cannot_represent(architecture):
    entry = ARCHITECTURES[architecture]
    model = entry.from_config(OTHER[architecture][0], "config.json")
    assert entry.refusals(model) == [] and architecture_for(model) is entry
    for fields, feature in UNSUPPORTED[architecture]:
        (refusal,) = entry.refusals(model.model_copy(update=fields))
        assert refusal.startswith(f"does not support {feature}")
    with pytest.raises(
        UserError, match="no Hugging Face architecture supports this model"
    ) as error:
        architecture_for(model.model_copy(update={"normalization": "none"}))
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Qwen3ForCausalLM",
        "MixtralForCausalLM", "Qwen3MoeForCausalLM",
    ]  # fmt: skip
