"""DeepSpeed's own tools read checkpoints written for Megatron-DeepSpeed."""

from __future__ import annotations

import argparse

import pytest
import torch

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
