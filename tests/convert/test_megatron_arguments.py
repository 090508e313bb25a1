"""The arguments and files of checkpoints that are written for Megatron-LM, written out."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from megatron_llmjp.config.loading import load_config
from megatron_llmjp.convert.formats.megatron_lm.arguments import tokenizer_type_of
from tests.convert.hf_models import MODELS

STAGES = {
    "account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False,
    "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None, "virtual_pipeline_model_parallel_size": None,
    # nothing from which a run could resume
    "data_parallel_random_init": False, "no_save_optim": True, "no_save_rng": True,
}  # fmt: skip
COMMON = {
    **STAGES,
    # of every model here; Megatron-LM's names (arguments.py, core 0.6 to 0.16)
    "add_position_embedding": True, "add_qkv_bias": False, "apply_layernorm_1p": False,
    "apply_query_key_layer_scaling": False, "apply_residual_connection_post_layernorm": False,
    "consumed_train_samples": 0, "consumed_valid_samples": 0, "data_parallel_size": 1,
    "encoder_num_layers": 3, "hidden_size": 64, "init_method_std": 0.02, "iteration": 0,
    "make_vocab_size_divisible_by": 128, "max_position_embeddings": 64, "num_experts": None,
    "num_layers": 3, "onnx_safe": None, "openai_gelu": False,
    "rope_scaling_factor": 8.0, "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None, "seq_length": 64, "squared_relu": False,
    "true_vocab_size": 101, "use_mcore_models": True, "use_rope_scaling": False,
}  # fmt: skip
OWN = {
    "gpt2": {
        "add_bias_linear": True, "attention_dropout": 0.1, "bf16": False, "bias_gelu_fusion": True,
        "ckpt_format": "torch_dist", "ffn_hidden_size": 144, "fp16": False,
        "group_query_attention": False, "hidden_dropout": 0.1, "kv_channels": 16,
        "layernorm_epsilon": 1e-5, "norm_epsilon": 1e-5, "normalization": "LayerNorm",
        "num_attention_heads": 4, "num_query_groups": 1, "padded_vocab_size": 128,
        "pipeline_model_parallel_size": 1, "position_embedding_type": "learned_absolute",
        "rotary_base": 10000, "rotary_percent": 1.0, "swiglu": False,
        "tensor_model_parallel_size": 1, "transformer_impl": "transformer_engine",
        "untie_embeddings_and_output_weights": False, "use_rotary_position_embeddings": False,
        "qk_layernorm": False,
    },
    "llama": {
        "add_bias_linear": False, "attention_dropout": 0.0, "bf16": True, "bias_gelu_fusion": False,
        "ckpt_format": "torch", "ffn_hidden_size": 176, "fp16": False,
        "group_query_attention": True, "hidden_dropout": 0.0, "kv_channels": 12,
        "layernorm_epsilon": 3e-5, "norm_epsilon": 3e-5, "normalization": "RMSNorm",
        "num_attention_heads": 8, "num_query_groups": 4, "padded_vocab_size": 256,
        "pipeline_model_parallel_size": 1, "position_embedding_type": "rope",
        "rotary_base": 5000, "rotary_percent": 1.0, "swiglu": True,
        "tensor_model_parallel_size": 2, "transformer_impl": "transformer_engine",
        "untie_embeddings_and_output_weights": True, "use_rotary_position_embeddings": True,
        "qk_layernorm": False,
    },
    "gpt_neox": {
        "add_bias_linear": True, "attention_dropout": 0.0, "bf16": False,
        "bias_gelu_fusion": False, "ckpt_format": "torch", "ffn_hidden_size": 144, "fp16": True,
        "group_query_attention": False, "hidden_dropout": 0.0, "kv_channels": 16,
        "layernorm_epsilon": 1e-5, "norm_epsilon": 1e-5, "normalization": "LayerNorm",
        "num_attention_heads": 4, "num_query_groups": 1, "padded_vocab_size": 128,
        "pipeline_model_parallel_size": 3, "position_embedding_type": "rope",
        "rotary_base": 5000, "rotary_percent": 0.5, "swiglu": False,
        "tensor_model_parallel_size": 1, "transformer_impl": "local",
        "untie_embeddings_and_output_weights": True, "use_rotary_position_embeddings": True,
        "qk_layernorm": False,
    },
}  # fmt: skip
OWN["qwen3"] = {**OWN["llama"], "qk_layernorm": True}
LEGACY = ("--ckpt-format", "torch")
FLAGS = {
    "gpt2": (),
    "llama": (*LEGACY, "--dtype", "bf16", "--target-tensor-parallel-size", 2),
    "gpt_neox": (*LEGACY, "--transformer-impl", "local", "--dtype", "fp16",
                 "--target-pipeline-parallel-size", 3),
}  # fmt: skip
FLAGS["qwen3"] = FLAGS["llama"]
FILES = {
    "gpt2": [".metadata", "__0_0.distcp", "common.pt", "metadata.json"],
    "llama": [f"mp_rank_0{rank}/model_optim_rng.pt" for rank in range(2)],
    "gpt_neox": [f"mp_rank_00_00{stage}/model_optim_rng.pt" for stage in range(3)],
}
FILES["qwen3"] = FILES["llama"]


@pytest.mark.parametrize("architecture", MODELS)
def test_arguments_and_files(tmp_path, convert, architecture):
    MODELS[architecture]().save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", "--input", tmp_path / "hf", "--output", tmp_path / "there",
            *FLAGS[architecture])  # fmt: skip
    names = [str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*")]
    files = [f"release/{name}" for name in FILES[architecture]]
    found = {name for name in names if not (tmp_path / "there" / name).is_dir()}
    assert found == {"latest_checkpointed_iteration.txt", *files}
    tracker = tmp_path / "there" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "release"
    for name in files:
        if name.endswith(".pt"):
            content = torch.load(tmp_path / "there" / name, weights_only=False)
            expected = {**COMMON, **OWN[architecture]}
            stages = expected["pipeline_model_parallel_size"]
            expected["transformer_pipeline_model_parallel_size"] = stages
            expected["world_size"] = expected["tensor_model_parallel_size"] * stages
            assert vars(content.pop("args")) == expected
            content.pop("model", None)
            assert content == {"checkpoint_version": 3.0, "iteration": 0}


@pytest.mark.parametrize("flags", [(), LEGACY], ids=["torch_dist", "torch"])
def test_an_iteration_is_kept(tmp_path, convert, flags):
    """With the tokenizer type of the run and its consumed samples."""
    MODELS["llama"]().save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", *LEGACY, "--input", tmp_path / "hf", "--output", tmp_path / "a")
    path = tmp_path / "a" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"].tokenizer_type = "Llama2Tokenizer"
    content["args"].consumed_train_samples = 80
    torch.save({**content, "iteration": 20}, path)
    text = convert("--to", "megatron-lm", *flags, "--input", tmp_path / "a",
                   "--output", tmp_path / "b")  # fmt: skip
    assert "iteration 20" in text
    tracker = tmp_path / "b" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "20"
    folder = tmp_path / "b" / "iter_0000020"
    file = "mp_rank_00/model_optim_rng.pt" if flags else "common.pt"
    content = torch.load(folder / file, weights_only=False)
    assert (content["iteration"], content["args"].iteration) == (20, 20)
    assert content["args"].tokenizer_type == "Llama2Tokenizer"
    assert content["args"].consumed_train_samples == 80
    convert("--to", "native", "--input", tmp_path / "a", "--output", tmp_path / "n")
    manifest = json.loads((tmp_path / "n" / "iter_0000020" / "manifest.json").read_text())
    assert (manifest["iteration"], manifest["consumed_samples"]) == (20, 80)
    assert manifest["contents"] == "weights"


@pytest.mark.parametrize(("name", "found"), [(None, None), ("", None), (5, None), ("X", "X")])
def test_tokenizer_types(name, found):
    assert tokenizer_type_of(argparse.Namespace(tokenizer_type=name)) == found
    assert tokenizer_type_of(argparse.Namespace()) is None


def test_a_vocabulary_without_padding(tmp_path, convert):
    """Which is not larger than the padded size of the source."""
    MODELS["gpt2"](vocab_size=128).save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "a")
    convert("--to", "native", "--input", tmp_path / "a", "--output", tmp_path / "b")
    model = load_config(next((tmp_path / "b").glob("iter_*")) / "config.yaml").model
    assert (model.vocab_size, model.padded_vocab_size) == (128, 128)
