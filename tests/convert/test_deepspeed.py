"""DeepSpeed's own tools read checkpoints written for Megatron-DeepSpeed."""

from __future__ import annotations

import argparse

import pytest
import torch

from megatron_llmjp.convert.formats.megatron_deepspeed import reader
from tests.convert.hf_models import MODELS


@pytest.mark.parametrize(("architecture", "tensor", "pipeline"), [("gpt2", 2, 3), ("llama", 4, 1)])
def test_deepspeed_checkpoint_reads_the_output(
    tmp_path, convert, monkeypatch, architecture, tensor, pipeline
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from deepspeed.checkpoint import DeepSpeedCheckpoint

    model = MODELS[architecture](**({"rope_theta": 10000.0} if architecture == "llama" else {}))
    model.save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf",
            "--output", tmp_path / "there", "--target-tensor-parallel-size", tensor,
            "--target-pipeline-parallel-size", pipeline)  # fmt: skip
    folder = next((tmp_path / "there").glob("global_step*"))
    for rank in range(tensor * pipeline):  # it requires optimizer files, even empty ones
        path = folder / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": {}}, path)
    untied = not model.config.tie_word_embeddings
    monkeypatch.setattr(torch, "load", _trusting(torch.load))
    found = DeepSpeedCheckpoint(str(folder), final_layer_norm_idx=-2 if untied else -1)
    assert (found.tp_degree, found.pp_degree) == (tensor, pipeline)
    assert found.get_iteration() == 0
    assert isinstance(found.get_args(), argparse.Namespace)
    word = model.get_input_embeddings().weight
    embedding = [found.get_embedding_state(t)["word_embeddings.weight"] for t in range(tensor)]
    assert torch.equal(torch.cat(embedding)[:101], word)
    norm = found.get_final_norm_state(0)["weight"]
    names = dict(model.named_parameters())
    assert torch.equal(norm, names.get("transformer.ln_f.weight", names.get("model.norm.weight")))
    layers = [found.get_transformer_state(0, p) for p in range(pipeline)]
    assert sum(map(len, layers)) == 3


def _trusting(load):
    """DeepSpeed 0.10 to 0.19 use torch.load with its old default."""
    return lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)]
)
def test_ds_to_universal_reads_the_optimizer(tmp_path, convert, monkeypatch, architecture, dtype):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from deepspeed.checkpoint import ds_to_universal

    model = MODELS[architecture](**({"rope_theta": 10000.0} if architecture == "llama" else {})).to(
        dtype
    )
    model.save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf",
            "--output", tmp_path / "there", "--with-optimizer",
            "--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 3)  # fmt: skip
    folder = next((tmp_path / "there").glob("global_step*"))
    monkeypatch.setattr(torch, "load", _trusting(torch.load))
    flags = ["--input_folder", str(folder), "--output_folder", str(tmp_path / "universal"),
             "--num_extract_workers", "1", "--num_merge_workers", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["ds_to_universal", *flags])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    zero = tmp_path / "universal" / "zero"
    if architecture == "llama":
        mlp = model.model.layers[0].mlp
        fc1 = torch.load(zero / "2.mlp.dense_h_to_4h.weight" / "fp32.pt")["param"]
        assert torch.equal(fc1, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        words = zero / "1.word_embeddings.weight"
    else:
        words = zero / "tied_modules.embed.word_embeddings.weight"
    found = torch.load(words / "fp32.pt")["param"]
    assert torch.equal(found[:101], model.get_input_embeddings().weight.float())
    assert not torch.load(words / "exp_avg.pt")["param"].any()


def test_patterns_of_parameters(tmp_path, convert):
    """LLaMA's differ from those of the recorded GPT run (test_zero.py)."""
    MODELS["llama"](rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf",
            "--output", tmp_path / "ds", "--with-optimizer")  # fmt: skip
    (folder,) = (tmp_path / "ds").glob("global_step*")
    trackers = ("latest", "latest_checkpointed_iteration.txt")  # weights of no iteration
    assert [(tmp_path / "ds" / name).read_text() for name in trackers] == [folder.name, "0"]
    assert folder.name == "global_step0"
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    assert content["universal_checkpoint_info"] == {
        "universal_checkpoint_version": 0.4,
        "original_vocab_size": 101,
        "padded_vocab_size": 128,
        "vocabulary_parameter_patterns": [r"\d+.word_embeddings.weight", r"\d+.lm_head.weight"],
        "pipeline_replicated_parameter_patterns": [],
        "tp_replicated_parameter_patterns": [
            r"\d+.input_layernorm.weight",
            r"\d+.post_attention_layernorm.weight",
            r"\d+.weight",
        ],
        "parameter_with_row_parallelism_patterns": [
            r"\d+.mlp.dense_4h_to_h.weight",
            r"\d+.self_attention.dense.weight",
        ],
        "parameter_with_2_sub_params_cat_dim_0": [r"\d+.mlp.dense_h_to_4h.weight"],
    }
    args = content["args"]
    llama = {
        "num_key_value_heads": 4, "kv_channels": 12, "ffn_hidden_size": 176, "swiglu": True,
        "normalization": "rmsnorm", "layernorm_epsilon": 3e-5, "norm_epsilon": 3e-5,
        "add_bias_linear": False, "add_position_embedding": False,
        "use_rotary_position_embeddings": True, "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": True, "num_experts": [1], "deepspeed": True,
        "no_pipeline_parallel": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "seq_length": 64, "max_position_embeddings": 64, "bf16": False, "fp16": False,
    }  # fmt: skip
    assert {key: getattr(args, key) for key in llama} == llama
    fresh = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    fresh |= {"decoupled_weight_decay": True}
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    optimizer = torch.load(path, weights_only=False)["optimizer_state_dict"]
    groups = optimizer["base_optimizer_state"]["param_groups"]
    assert groups == [{**fresh, "params": [0]}, {**fresh, "params": [1]}]
    scaling = {"loss_scaler": None, "dynamic_loss_scale": False, "overflow": False}
    assert optimizer.items() >= {**scaling, "zero_stage": 1, "clip_grad": 1.0}.items()


@pytest.mark.parametrize(
    ("megatron", "deepspeed", "expected"), [(7, 9, 7), (0, 9, 9), (None, 9, 9), (None, None, None)]
)
def test_consumed_samples_are_megatrons(megatron, deepspeed, expected):
    """DeepSpeed's count starts again where a run began to use DeepSpeed."""
    args = argparse.Namespace(consumed_train_samples=megatron)
    assert reader._consumed_samples(args, {"global_samples": deepspeed}) == expected
